"""Daft decodes the pictures of a folder and resizes them to 224 x 224: python daft_resize.py FOLDER."""

import sys

import daft
from daft import col
from daft.functions import decode_image, download, resize

frame = daft.from_glob_path(f"{sys.argv[1]}/*.jpg")
pictures = resize(decode_image(download(col("path")), mode="RGB"), 224, 224)
print(len(frame.select(pictures.alias("picture")).collect()))
