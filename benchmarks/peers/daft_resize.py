"""Daft decodes the pictures of a folder and resizes them to 224 x 224: python daft_resize.py FOLDER."""

import sys

import cpu_clock
import daft
from daft import col
from daft.functions import decode_image, download, resize

daft.set_runner_native(num_threads=1)
started = cpu_clock.now()
frame = daft.from_glob_path(f"{sys.argv[1]}/*.jpg")
pictures = resize(decode_image(download(col("path")), mode="RGB"), 224, 224)
done = len(frame.select(pictures.alias("picture")).collect())
cpu_clock.tell(done, started)
