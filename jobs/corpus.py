"""Stage `corpus` as a job: `python jobs/corpus.py RECIPE [key=value …]`, here or by `ray job submit`."""

import sys

from mmflow.cli.main import main

if __name__ == "__main__":
    main(["corpus", *sys.argv[1:]])
