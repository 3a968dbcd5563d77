"""Find the archive or folder that data.sources names: a verified download or a local path."""

from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import pooch

from cifarlab.data.archives import members
from cifarlab.data.layout import is_hidden
from cifarlab.errors import UserError, first_line
from cifarlab.params.sections import DEFAULT_FOLDER, DataParams, is_remote

ATTEMPTS = 3
"""How often all sources are tried, if one of them is a download."""
TIMEOUT = 30
"""Seconds without a byte after which a download is given up."""


def fetch(params: DataParams, root: Path, cache: Path) -> Path:
    """Return the path of the first source in `data.sources` that works.

    A download lies in the folder `cache`, and its SHA-256 is data.sha256. So is that of a local
    archive, unless data.sha256 is null. Relative paths start at `root`.

    Raises
    ------
    UserError
        No source works. The message names the reason for each.
    """
    failures: list[str] = []
    attempts = ATTEMPTS if any(map(is_remote, params.sources)) else 1
    for source in params.sources * attempts:
        try:
            if is_remote(source):
                return _download(source, str(params.sha256), cache)
            return _local(source, params.sha256, root)
        # ValueError, RuntimeError: an impossible URL, path or home folder.
        except (UserError, ValueError, RuntimeError, OSError) as error:
            failures.append(f"{source}: {first_line(error)}")
    reasons = "; ".join(dict.fromkeys(failures))
    copy = "use a copy: dvc exp run -S 'data.sources=[/path/to/archive]', or try `make demo`"
    raise UserError(f"no source of {params.name} could be used ({reasons}); {copy}")


def find_images(params: DataParams, root: Path, cache: Path) -> Path:
    """Return data.folder or, if that is the default and as empty as in Git, what `fetch` finds.

    UserError: there is no such folder, or the main checkout has the images, but not this copy.
    """
    folder = Path(params.folder).expanduser()
    if params.folder != DEFAULT_FOLDER or holds_files(folder):
        if not folder.exists():
            raise UserError(f"data.folder = {folder} does not exist")
        return folder
    if Path.cwd() != root and holds_files(root / folder):
        way_out = f"set data.folder={root / folder}, or leave out --temp and --queue"
        raise UserError(f"DVC's temporary copy of the checkout lacks {folder}/; {way_out}")
    print(f"{folder}/ holds no images, so data.sources is read")
    found = fetch(params, root, cache)
    if not found.is_relative_to(cache):
        print(f"DVC does not notice when {found} changes; data.folder={found} tells it to look")
    return found


def holds_files(folder: Path) -> bool:
    """Tell whether a path is a folder with more in it than README.md and hidden files."""
    return folder.is_dir() and any(
        member.name != "README.md" and not is_hidden(member.name) for member in members(folder)
    )


def _local(source: str, sha256: str | None, root: Path) -> Path:
    """Return the path of a local archive or folder after checking its checksum."""
    url = urlsplit(source)
    path = Path(unquote(url.path)) if url.scheme == "file" else root / Path(source).expanduser()
    if not path.exists():
        raise UserError(f"does not exist (relative paths start at {root})")
    if not path.is_file() and not path.is_dir():  # a pipe or device could be read without end
        raise UserError("is neither a file nor a folder")
    if sha256 and path.is_dir():
        raise UserError("a directory has no checksum, set data.sha256: null")
    if sha256 and (found := pooch.file_hash(path)) != sha256:
        raise UserError(f"its SHA-256 is {found}, data.sha256 says {sha256}")
    return path


def _download(url: str, sha256: str, cache: Path) -> Path:
    """Download an archive, unless the cache holds it. Its checksum is verified either way."""
    import requests

    pooch.get_logger().setLevel("WARNING")
    # With the checksum in its name, another archive under the same URL gets a file of its own.
    name = f"{sha256[:16]}-{PurePosixPath(urlsplit(url).path).name[-100:]}"
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    try:
        return Path(pooch.retrieve(url, f"sha256:{sha256}", name, cache, downloader=downloader))
    except requests.RequestException as error:
        status = "" if error.response is None else f" {error.response.status_code}"
        raise UserError(f"the download failed, {type(error).__name__}{status}") from error
    except ValueError as error:
        raise UserError(f"the server sent another file, SHA-256 is not {sha256}") from error
    except OSError as error:
        raise UserError(f"{cache} cannot be written, {error.strerror or error}") from error
