"""Stage `promote` as a job: `python jobs/promote.py RECIPE [key=value …]`, here or by `ray job submit`."""

import sys

from mmflow.cli.main import main

if __name__ == "__main__":
    main(["promote", *sys.argv[1:]])
