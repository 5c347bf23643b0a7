"""Stage `score` as a job: `python jobs/score.py RECIPE [key=value …]`, here or by `ray job submit`."""

import sys

from mmflow.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
