"""Data-Juicer's executor on a folder: image_shape_filter, image_aspect_ratio_filter, image_deduplicator (phash).

Runs in its own virtual environment: python datajuicer_filter.py FOLDER
"""

import json
import pathlib
import sys
import tempfile

import cpu_clock

RECIPE = """
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

if __name__ == "__main__":
    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor

    with tempfile.TemporaryDirectory() as work:
        place = pathlib.Path(work)
        rows = [
            {"text": "<__dj__image> a picture", "images": [str(p)]}
            for p in sorted(pathlib.Path(sys.argv[1]).glob("*.jpg"))
        ]
        (place / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (place / "recipe.yaml").write_text(RECIPE.format(work=work))
        executor = DefaultExecutor(init_configs(["--config", f"{work}/recipe.yaml"]))
        started = cpu_clock.now()
        executor.run()
        cpu_clock.tell(sum(1 for _ in open(place / "out.jsonl")), started)
