"""Stage `distill` as a job: `python jobs/distill.py RECIPE [key=value …]`, here or by `ray job submit`."""

import sys

from mmflow.cli.main import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
