"""cleanvision's nine checks on a folder, one process: python cleanvision_issues.py FOLDER."""

import sys

from cleanvision import Imagelab

if __name__ == "__main__":
    lab = Imagelab(data_path=sys.argv[1])
    lab.find_issues(n_jobs=1)
    print(len(lab.issues))
