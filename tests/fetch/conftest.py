"""The misbehaving web server as a fixture of all tests of fetching."""

from tests.fetch.webserver import server as server
