"""The page for people: the files below `serve/pages`, sent as they are. The page itself speaks to the API like any other client."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

PAGES = Path(__file__).parent / "pages"
HEADERS = {
    "Cache-Control": "no-cache",  # a browser asks each time, so an update arrives at once
    "Content-Security-Policy": "default-src 'none'; img-src data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}  # some systems know none for .js

router = APIRouter()


@router.get("/", include_in_schema=False)
async def index() -> FileResponse:
    """The page."""
    return await page_file("index.html")


@router.get("/pages/{name}", include_in_schema=False)
async def page_file(name: str) -> FileResponse:
    """Its style or one of its scripts; HTTPException 404 for any other name."""
    if name not in {file.name for file in PAGES.iterdir()}:
        raise HTTPException(404, "there is no such file")
    file = PAGES / name
    return FileResponse(file, headers=HEADERS, media_type=MEDIA_TYPES[file.suffix])
