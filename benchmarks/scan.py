"""Memory per file of finding and checking images, as Python counts it.

    python -m benchmarks.scan [--files 300000]

The files are the same GIF of one pixel, in 30 folders below a temporary one. Counting slows
everything down, so the time says nothing.
"""

import argparse
import io
import tempfile
import tracemalloc
from pathlib import Path

from PIL import Image

from cnnft.data.reading import read_dataset
from cnnft.data.sources import open_source

FOLDERS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes of memory per image file.")
    parser.add_argument("--files", type=int, default=300_000)
    options = parser.parse_args()
    gif = io.BytesIO()
    Image.new("L", (1, 1)).save(gif, "GIF")
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.files):
            folder = Path(place, f"class-{number % FOLDERS:02d}")
            folder.mkdir(exist_ok=True)
            (folder / f"photograph-{number:09d}.gif").write_bytes(gif.getvalue())
        tracemalloc.start()
        source = open_source(place)
        samples, _ = source.files("train", source.classes("train"))
        report("found", len(samples.paths[0]), options.files)
        samples = read_dataset(source, ("train",)).train
        assert len(samples) == options.files
        report("checked", len(samples.paths[0]), options.files)


def report(what: str, characters: int, files: int) -> None:
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    print(
        f"{what}: {kept / files:.0f} bytes per file kept, {peak / files:.0f} at the peak "
        f"({files:,} files, paths of {characters} characters)"
    )


if __name__ == "__main__":
    main()
