"""img2dataset fetches and verifies a list of URLs, no resizing: python img2dataset_fetch.py LIST.csv (columns url, caption)."""

import glob
import json
import sys
import tempfile

import cpu_clock

if __name__ == "__main__":
    from img2dataset import download

    with tempfile.TemporaryDirectory() as out:
        started = cpu_clock.now()
        download(
            url_list=sys.argv[1],
            input_format="csv",
            url_col="url",
            caption_col="caption",
            output_folder=out,
            output_format="webdataset",
            resize_mode="no",
            skip_reencode=True,
            processes_count=1,
            thread_count=16,
            number_sample_per_shard=2000,
            enable_wandb=False,
        )
        cpu_clock.tell(sum(json.load(open(f))["successes"] for f in glob.glob(f"{out}/*_stats.json")), started)
