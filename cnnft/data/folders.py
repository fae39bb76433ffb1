"""What folders hold: the images of each, and all else by kind and number. Knows no layout."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cnnft.data.dataset import HIDDEN, LINK, OWN, UNSUITED, Skipped
from cnnft.data.images import opens
from cnnft.data.names import is_hidden, is_named_as_image, name_of, unsuited, why_no_images
from cnnft.errors import CnnftError

OnFiles = Callable[[int, int | None], object]
"""Called with how many more files were found (None), or were checked (of how many in all)."""

RUN_MARKS = (("formats.json", "formats"), ("config.json", "cnnft"))
"""(file, key of its JSON object): beside a config.toml, only cnnft writes one of these. Runs of
the first format have no formats.json."""


_MOST_BYTES = 64 * 1024**2  # of a run's JSON, which lists its classes


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies in one folder; sorted, as torchvision's ImageFolder sorts."""

    path: str
    images: tuple[str, ...]
    """Files that are to be opened, by their names: those without a suffix are, and links to
    nothing, which may have been folders."""
    folders: tuple[str, ...]
    hidden: tuple[str, ...]
    """Folders that are hidden, or a system's."""
    others: tuple[Skipped, ...]
    """Files that are not to be opened, together by reason; the path is the first one's."""
    is_run: bool


class _Apart(NamedTuple):
    """A folder that is not looked into, and why."""

    path: str
    reason: str


class Tree:
    """A folder and those below it, each listed once, when it is first asked for.

    Symbolic links are followed: below any folder that is asked about each real folder is read
    once, and none that it lies in, so that a loop ends.
    """

    def __init__(
        self,
        root: str | Path,
        include_hidden: bool = False,
        on_files: OnFiles = lambda count, total: None,
    ) -> None:
        self.root = str(root)
        self._include_hidden = include_hidden
        self._on_files = on_files
        self._listings: dict[str, Listing] = {}
        self._links: set[str] = set()  # to folders, and to nothing
        self._holding: dict[str, bool] = {}

    def listing(self, folder: str) -> Listing:
        """Raises `CnnftError`: the folder cannot be read."""
        if folder not in self._listings:
            listing = self._listings[folder] = self._scan(folder)
            if listing.images:
                self._on_files(len(listing.images), None)
        return self._listings[folder]

    def holds_images(self, folder: str) -> bool:
        """Whether there is any below it, by its name, or by its content where that says nothing."""
        if folder not in self._holding:
            found = (here for here in self._visit(folder) if isinstance(here, Listing))
            self._holding[folder] = any(
                is_named_as_image(path) or ("." not in name_of(path) and opens(path))
                for here in found
                for path in here.images
            )
        return self._holding[folder]

    def with_images(self, folder: str) -> list[str]:
        """The folders in `folder` that hold images."""
        return [path for path in self.listing(folder).folders if self.holds_images(path)]

    def broken(self, folder: str) -> list[str]:
        """Links to nothing in `folder` that may have been folders by their names."""
        found = self._links.intersection(self.listing(folder).images)
        return sorted(path for path in found if not is_named_as_image(path))

    def contents(self, folder: str) -> tuple[list[str], list[Skipped]]:
        """All images below it, in the order of torchvision's ImageFolder, and all else."""
        images: dict[str, tuple[str, ...]] = {}
        loose: list[Skipped] = []
        apart: list[Skipped] = []
        for found in self._visit(folder):
            if isinstance(found, Listing):
                images[found.path] = found.images
                loose += found.others
            else:
                apart.append(self.whole(*found))
        paths = [path for here in sorted(images) for path in images[here]]
        return paths, together(folder, loose) + apart

    def beside(self, folder: str, reason: str) -> list[Skipped]:
        """The files and the hidden folders in `folder`, which are not to be used for `reason`."""
        listing = self.listing(folder)
        files: dict[str, list[str]] = {}
        for path in listing.images:
            files.setdefault(reason if is_named_as_image(path) else UNSUITED, []).append(path)
        loose = together(folder, [*listing.others, *_left_out(files)])
        return loose + [self.whole(path, HIDDEN) for path in listing.hidden]

    def whole(self, folder: str, reason: str) -> Skipped:
        """The folder, left out with all that is in it; links in it are not followed."""
        path = folder.rstrip(os.sep) + os.sep
        if reason == LINK:
            return Skipped(path, reason, 1, 0)
        files, images = _count(folder)
        if reason == OWN:  # other files come while a run trains
            files = images
        return Skipped(path, reason, files, images)

    def without_images(self, folder: str) -> Skipped:
        """`whole` of a folder that holds none."""
        reasons: dict[str, str] = {}
        others: list[Skipped] = []
        for found in self._visit(folder):
            if isinstance(found, Listing):
                others += found.others
            else:
                reasons[found.path] = found.reason
        own = OWN if OWN in reasons.values() else why_no_images(others)
        return self.whole(folder, reasons.get(folder, own))

    def _visit(self, folder: str) -> Iterator[Listing | _Apart]:
        """Each folder from this one down. Links come last: a folder is read at its own place."""
        seen = self._above(folder)
        waiting, links = [folder], list[str]()
        while waiting or links:
            path = waiting.pop() if waiting else links.pop(0)
            real = os.path.realpath(path)
            if real in seen:
                yield _Apart(path, LINK)
                continue
            seen.add(real)
            listing = self.listing(path)
            if listing.is_run or self._is_of_runs(listing):
                yield _Apart(path, OWN)
                continue
            yield listing
            yield from (_Apart(hidden, HIDDEN) for hidden in listing.hidden)
            waiting += [path for path in reversed(listing.folders) if path not in self._links]
            links += [path for path in listing.folders if path in self._links]

    def _is_of_runs(self, listing: Listing) -> bool:
        """Whether all folders in it are runs, with no more images beside them: strays, no class."""
        strays = len(listing.images) <= len(listing.folders)
        if listing.path == self.root or not listing.folders or not strays:
            return False
        return all(self.listing(path).is_run for path in listing.folders)

    def _above(self, folder: str) -> set[str]:
        """Real paths of the folders that it lies in, also by way of links."""
        lexical = [folder]
        while lexical[-1] != self.root:
            lexical.append(str(Path(lexical[-1]).parent))
        above = {os.path.realpath(path) for path in lexical[1:]}
        for path in (self.root, folder):
            above |= {str(parent) for parent in Path(os.path.realpath(path)).parents}
        return above

    def _scan(self, folder: str) -> Listing:
        images, folders, hidden = list[str](), list[str](), list[str]()
        others: dict[str, list[str]] = {}
        names: set[str] = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    apart = not self._include_hidden and is_hidden(entry.name)
                    if _is_folder(entry):
                        (hidden if apart else folders).append(entry.path)
                        if entry.is_symlink():
                            self._links.add(entry.path)
                        continue
                    reason = HIDDEN if apart else unsuited(entry.name)
                    if not apart and _is_broken(entry):
                        self._links.add(entry.path)
                        reason = None
                    if reason is None:
                        images.append(entry.path)
                        continue
                    others.setdefault(reason, []).append(entry.path)
                    if entry.name.endswith((".toml", ".json")):
                        names.add(entry.name)
        except OSError as error:
            raise CnnftError(f"{folder}: cannot be read ({error.strerror})") from error
        return Listing(
            folder,
            tuple(sorted(images)),
            tuple(sorted(folders)),
            tuple(sorted(hidden)),
            _left_out(others),
            _is_run(folder, names),
        )


def image_files(folder: str | Path) -> tuple[list[str], list[Skipped]]:
    """Image files below `folder` in the order of torchvision's ImageFolder, and all else.

    Raises:
        CnnftError: a folder cannot be read.
    """
    return Tree(folder).contents(str(folder))


def together(folder: str, files: Iterable[Skipped]) -> list[Skipped]:
    """One for each reason; several files are named by a pattern below `folder`."""
    by_reason: dict[str, list[Skipped]] = {}
    for file in files:
        by_reason.setdefault(file.reason, []).append(file)
    joined = []
    for reason, group in by_reason.items():
        count = sum(file.files for file in group)
        path = str(Path(folder, "*")) if count > 1 else group[0].path
        joined.append(Skipped(path, reason, count, sum(file.images for file in group)))
    return joined


def _left_out(files: Mapping[str, Sequence[str]]) -> tuple[Skipped, ...]:
    """Files of one folder by reason."""
    return tuple(
        Skipped(min(paths), reason, len(paths), sum(map(is_named_as_image, paths)))
        for reason, paths in files.items()
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_broken(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link that cannot be followed, but for one that leads to itself."""
    try:
        return entry.is_symlink() and not entry.stat()
    except OSError as error:
        return error.errno != errno.ELOOP


def _count(folder: str) -> tuple[int, int]:
    """Files below it, and those that are named as images; what cannot be read counts as none."""
    files = images = 0
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        files += 1
                        images += is_named_as_image(entry.name)
        except OSError:
            continue
    return files, images


def _is_run(folder: str, names: set[str]) -> bool:
    return "config.toml" in names and any(
        name in names and _has_key(Path(folder, name), key) for name, key in RUN_MARKS
    )


def _has_key(path: Path, key: str) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return False
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and isinstance(values.get(key), dict)
