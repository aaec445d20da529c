"""A sheet of pictures: originals beside what became of them, each with an enlarged crop below."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE_PX, GAP_PX, LABEL_PX = 144, 6, 34


def picture_sheet(columns: dict[str, np.ndarray], crop_share: float = 0.25) -> bytes:
    """PNG; `columns` are titles over (N, S, S, 3) uint8, the originals first. The crop is where the original has most detail."""
    titles, stacks = list(columns), list(columns.values())
    count, side = stacks[0].shape[:2]
    step_x, step_y = SIDE_PX + GAP_PX, 2 * SIDE_PX + 2 * GAP_PX
    sheet = Image.new("RGB", (GAP_PX + step_x * len(titles), LABEL_PX + step_y * count), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    crop_px = max(2, round(side * crop_share))
    corners = [most_detail(picture, crop_px) for picture in stacks[0]]
    for i, (title, stack) in enumerate(zip(titles, stacks, strict=True)):
        x = GAP_PX + i * step_x
        draw.multiline_text((x, 3), _two_lines(title), "black", font)
        for row, (picture, (top, left)) in enumerate(zip(stack, corners, strict=True)):
            y = LABEL_PX + row * step_y
            crop = picture[top : top + crop_px, left : left + crop_px]
            sheet.paste(_scaled(picture), (x, y))
            sheet.paste(_scaled(crop), (x, y + SIDE_PX + GAP_PX // 2))
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def most_detail(picture: np.ndarray, crop_px: int) -> tuple[int, int]:
    """Top and left of the square of `crop_px` in which neighbouring pixels of (S, S, 3) uint8 differ most; steps of half a crop."""
    grey = picture.astype(np.float32).mean(-1)
    starts = range(0, max(1, len(grey) - crop_px + 1), max(1, crop_px // 2))

    def detail(corner: tuple[int, int]) -> float:
        part = grey[corner[0] : corner[0] + crop_px, corner[1] : corner[1] + crop_px]
        return float(np.abs(np.diff(part, axis=0)).mean() + np.abs(np.diff(part, axis=1)).mean())

    return max(((top, left) for top in starts for left in starts), key=detail)


def _scaled(picture: np.ndarray) -> Image.Image:
    """To the cell's side; enlarged pixels stay sharp, so that what is seen was made and not interpolated."""
    larger = picture.shape[0] > SIDE_PX
    return Image.fromarray(picture).resize(
        (SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST
    )


def _two_lines(title: str) -> str:
    if len(title) <= 22:
        return title
    cut = title.rfind(" ", 0, 22)
    cut = 22 if cut < 1 else cut
    return f"{title[:cut]}\n{title[cut:].strip()[:22]}"
