"""Files of the Hugging Face hub, by its own client, in a process that is watched and ended.

The client is responsible for logins, mirrors and its cache. Servers are not trusted: its downloads have the
limits of `transport`.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dapt_jax.errors import UserError, one_line, redact
from dapt_jax.weights import transport

_POLL_S = 0.2


def fetch(repository: str, file: str, revision: str, address: str) -> Path:
    """Return the local copy of a file of the hub.

    Args:
        repository: `OWNER/NAME`.
        file: Path of the file in it.
        revision: Branch, tag or commit; empty for the main branch.
        address: The address as the user wrote it, for errors.

    Raises:
        UserError: The client is not installed, or the file cannot be obtained within the limits; says what to
            do by hand.
    """
    try:
        from huggingface_hub import constants, file_download
    except ImportError:
        raise UserError(f"{address} needs: pip install 'dapt_jax[hub]' (huggingface_hub)") from None
    blobs = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(
        repo_id=repository, repo_type="model"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", _CODE, root, repository, file, revision]
    # The client's other protocol downloads in parallel, out of sight of the limits.
    environment = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **os.environ}
    before = set(_partials(blobs))
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is this process's to handle
    ) as client:
        try:
            failure = _watch(client, blobs / "blobs")
            answer = {"failure": failure} if failure else _answer(client)
        finally:
            if client.poll() is None:
                client.kill()
            client.wait()
            if client.returncode:
                for partial in set(_partials(blobs)) - before:  # the client resumes none of them
                    partial.unlink(missing_ok=True)
    if "path" in answer:
        return Path(answer["path"])
    page = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{file}"
    raise UserError(
        f"{address}: {answer['failure']}; download {page} where there is a network and pass the file's path"
    )


def _partials(folder: Path) -> list[Path]:
    return list(folder.glob("blobs/*.incomplete"))


def _size(partials: list[Path]) -> int:
    found = 0
    for partial in partials:
        with contextlib.suppress(OSError):  # completed meanwhile
            found += partial.stat().st_size
    return found


def _watch(client: subprocess.Popen[str], blobs: Path) -> str:
    """Wait until the client ends; return why it must be ended, or an empty text."""
    begun = window = time.monotonic()
    size = before = 0
    has_begun = False
    while client.poll() is None:
        time.sleep(_POLL_S)
        now, partials = time.monotonic(), _partials(blobs.parent)
        size = _size(partials)
        if partials and not has_begun:
            has_begun, window, before = True, now, size
        if now - begun > transport.LONGEST_S:
            return f"{size:,} bytes after {transport.LONGEST_S:,.0f} s: too slow"
        if not has_begun and now - begun > transport.ANSWER_S:
            return f"no file after {transport.ANSWER_S:,.0f} s"
        if size > transport.LARGEST:
            return f"more than {transport.LARGEST:,} bytes"
        if has_begun and now - window > transport.WINDOW_S:
            rate = (size - before) / (now - window)
            if partials and rate < transport.LEAST_RATE:
                return f"{rate:,.0f} bytes per second; expected {transport.LEAST_RATE:,} or more"
            window, before = now, size
    return ""


def _answer(client: subprocess.Popen[str]) -> dict[str, str]:
    assert client.stdout is not None
    try:
        found = json.loads(client.stdout.read(100_000))
        return {str(key): str(value) for key, value in found.items()}
    except (ValueError, AttributeError):
        return {"failure": f"the hub's client ended with exit code {client.returncode}"}


def download(repository: str, file: str, revision: str) -> dict[str, str]:
    """Download a file in this process.

    Returns:
        Its `path`, or the `failure`.
    """
    import huggingface_hub
    from huggingface_hub import constants

    try:
        known = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if not isinstance(known, str) and (size := _announced(repository, file, revision)):
            folder = Path(constants.HF_HUB_CACHE)
            folder.mkdir(parents=True, exist_ok=True)
            room = min(shutil.disk_usage(folder).free, transport.LARGEST)
            if size > room:
                return {
                    "failure": f"{size:,} bytes, and {room:,} are free in {folder} or allowed; make "
                    "room, or set HF_HOME to a folder on another disk"
                }
        path = huggingface_hub.hf_hub_download(repository, file, revision=revision or None)
    except Exception as error:  # errors of the client, and of the two HTTP libraries that it has used so far
        told = one_line(redact(" ".join(str(error).split())))[:160]
        return {"failure": f"{type(error).__name__}: {told}"}
    return {"path": path}


def _announced(repository: str, file: str, revision: str) -> int:
    """Return the announced bytes of a file; 0 if unknown, which the download itself then reports."""
    import huggingface_hub

    try:
        url = huggingface_hub.hf_hub_url(repository, file, revision=revision or None)
        return huggingface_hub.get_hf_file_metadata(url).size or 0
    except Exception:  # as in `download`
        return 0


_CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dapt_jax.weights import hub
answer = hub.download(*sys.argv[2:])
print(json.dumps(answer))
sys.exit("path" not in answer)
"""
