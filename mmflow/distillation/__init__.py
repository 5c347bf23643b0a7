"""What a student learns from its teacher."""
