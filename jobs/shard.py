"""Stage `shard` as a job: `python jobs/shard.py RECIPE [key=value …]`, here or by `ray job submit`."""

import sys

from mmflow.cli.main import main

if __name__ == "__main__":
    main(["shard", *sys.argv[1:]])
