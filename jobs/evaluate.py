"""Stage `evaluate` as a job: `python jobs/evaluate.py RECIPE [key=value …]`, here or by `ray job submit`."""

import sys

from mmflow.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
