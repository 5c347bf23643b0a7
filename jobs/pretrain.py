"""Stage `pretrain` as a job: `python jobs/pretrain.py RECIPE [key=value …]`, here or by `ray job submit`."""

import sys

from mmflow.cli.main import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
