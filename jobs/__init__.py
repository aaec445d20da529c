"""The commands, one short file an arrow between two stations: `python -m jobs.NAME RECIPE [--field value ...]`."""
