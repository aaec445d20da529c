"""cleanvision's nine checks on a folder, one process: python cleanvision_issues.py FOLDER."""

import sys

import cpu_clock
from cleanvision import Imagelab

if __name__ == "__main__":
    started = cpu_clock.now()
    lab = Imagelab(data_path=sys.argv[1])
    lab.find_issues(n_jobs=1)
    cpu_clock.tell(len(lab.issues), started)
