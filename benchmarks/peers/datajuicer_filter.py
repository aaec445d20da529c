"""Data-Juicer's own command line on a folder: image_shape_filter, image_aspect_ratio_filter, image_deduplicator (phash).

Runs in its own virtual environment: python datajuicer_filter.py FOLDER
"""

import json
import pathlib
import subprocess
import sys
import tempfile

folder = pathlib.Path(sys.argv[1])
with tempfile.TemporaryDirectory() as work:
    rows = [{"text": "<__dj__image> a picture", "images": [str(p)]} for p in sorted(folder.glob("*.jpg"))]
    (pathlib.Path(work) / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (pathlib.Path(work) / "recipe.yaml").write_text(
        f"""
project_name: bench
dataset_path: {work}/in.jsonl
export_path: {work}/out.jsonl
np: 1
open_tracer: false
use_cache: false
process:
  - image_shape_filter: {{min_width: 256, min_height: 256}}
  - image_aspect_ratio_filter: {{min_ratio: 0.5, max_ratio: 2.0}}
  - image_deduplicator: {{method: phash}}
"""
    )
    command = [str(pathlib.Path(sys.executable).parent / "dj-process"), "--config", f"{work}/recipe.yaml"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    print(sum(1 for _ in open(f"{work}/out.jsonl")))
