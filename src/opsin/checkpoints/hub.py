"""hub id → local folder, through huggingface_hub: its cache, mirrors, tokens and offline switch are the user's own.

    HF_HOME          where the cache lies
    HF_ENDPOINT      a mirror, e.g. https://hf-mirror.com
    HF_TOKEN         for gated and private models
    HF_HUB_OFFLINE   1: the cache only

huggingface_hub reads them when it is first imported. Weights come over plain HTTP into the cache's usual place, in a
partial file that outlives the process, so a transfer cut today goes on tomorrow; their sha256 is checked against the
one the hub states.
"""

import errno
import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from opsin.checkpoints.catalog import nearest
from opsin.errors import CheckpointError, HubError, ModelError, UnknownModel

log = logging.getLogger(__name__)

ARCHITECTURES = ("vit", "deit", "dinov2", "dinov2_with_registers", "perceiver")
"""Tags of the hub, the `model_type` of config.json, that opsin reads."""

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Best first; an index names the shards beside it."""

TIMEOUT_S = 10  # of a search
SHA256 = re.compile(r"[0-9a-f]{64}")
SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")

# everything that can go wrong on the way: the second is the base of httpx's or of requests' errors, whichever the
# installed huggingface_hub speaks with
TRANSPORT_ERRORS: tuple[type[Exception], ...] = (OSError, HfHubHTTPError.__mro__[1])


def download(repo_id: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Bring what a reader needs of a model into the cache: config, preprocessing, the best kind of weights it has.

    Whatever the cache holds whole is answered without asking the hub, a branch at the commit it had when it was
    fetched. For a later one name its commit, or let `hf download owner/name config.json` tell the cache where the
    branch is now: the next call fetches what is new.

    Args:
        repo_id: `google/vit-large-patch16-224`.
        revision: branch, tag or commit; the main branch without it.
        weights: False leaves them out, for who wants only the preprocessing.
    Returns:
        Snapshot folder in the cache. Treat it as read-only: it is shared with transformers and others.
    Raises:
        UnknownModel: no such model, or no such revision of it.
        HubError: not reachable and not in the cache, access refused, no weights that opsin reads, disk full.
        CheckpointError: an index of shards that is none, or that names files elsewhere.
    """
    revision = revision or "main"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UnknownModel(
            f'no model "{repo_id}": not a hub id (owner/name), and no such file or folder here.'
            f"{_did_you_mean(repo_id)} `opsin models` lists all."
        ) from error
    cached = _cached(repo_id, revision, weights)
    if cached is not None:
        return cached
    try:
        return _download(repo_id, revision, weights)
    except TRANSPORT_ERRORS as error:
        raise _explain(error, repo_id, revision) from error


def is_cached(repo_id: str, *, revision: str | None = None) -> bool:
    """Whether `download` could do without the hub. A few looks at the file system; False for what is no hub id."""
    try:
        return _cached(repo_id, revision or "main", weights=True) is not None
    except HFValidationError:
        return False


@dataclass(frozen=True, slots=True)
class HubModel:
    """One search result. `licence` is the identifier that its authors gave, None where they gave none."""

    name: str
    architecture: str  # one of ARCHITECTURES
    downloads: int  # in the last 30 days
    likes: int
    licence: str | None


def search(query: str = "", limit: int = 20) -> list[HubModel]:
    """Image classifiers on the hub that opsin can load, most downloaded first: `search("flowers")`.

    Only models that anyone may fetch and that hold PyTorch or safetensors weights; bare adapters are left out.

    Raises:
        HubError: the hub cannot be reached or refused.
    """
    found: dict[str, HubModel] = {}
    for architecture in ARCHITECTURES:
        params = {
            "search": query,
            "filter": [architecture, "transformers"],
            "pipeline_tag": "image-classification",
            "gated": "false",
            "sort": "downloads",
            "direction": "-1",
            "limit": str(2 * limit),  # some will be left out
        }
        try:  # not HfApi.list_models: it keeps an unreachable hub waiting for half a minute
            response = get_session().get(
                f"{constants.ENDPOINT}/api/models", params=params, headers=build_hf_headers(), timeout=TIMEOUT_S
            )
            hf_raise_for_status(response)
        except TRANSPORT_ERRORS as error:
            raise HubError(
                f"{constants.ENDPOINT} cannot be searched ({_said(error)}). Check the connection, HF_ENDPOINT and "
                "HF_HUB_OFFLINE; `opsin models` lists the catalogue without a hub."
            ) from error
        try:
            for model in response.json():
                tags, name = model["tags"], model["id"]
                if {"safetensors", "pytorch"}.intersection(tags) and "peft" not in tags:
                    licence = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)
                    found[name] = HubModel(name, architecture, model["downloads"], model["likes"], licence)
        except (ValueError, TypeError, KeyError) as error:  # the login page of a network, with status 200
            raise HubError(
                f"{constants.ENDPOINT} did not answer as a model hub does. Check HF_ENDPOINT, and whether this network "
                "wants a login first."
            ) from error
    return sorted(found.values(), key=lambda model: (-model.downloads, model.name))[:limit]


def _cached(repo_id: str, revision: str, weights: bool) -> Path | None:
    """Snapshot folder, if every file that a reader needs lies in the cache; the absence of an optional file counts
    when the hub has stated it before."""
    config = try_to_load_from_cache(repo_id, CONFIG, revision=revision)
    if not isinstance(config, str) or try_to_load_from_cache(repo_id, PREPROCESSOR, revision=revision) is None:
        return None
    folder = Path(config).parent
    if not weights:
        return folder
    for name in WEIGHTS:
        try:
            if (folder / name).is_file() and all((folder / shard).is_file() for shard in _shards(folder / name)):
                return folder
        except CheckpointError:
            continue  # the hub may have a repaired index
    return None


def _download(repo_id: str, revision: str, weights: bool) -> Path:
    """As `download`, but any failure is an error of the transport."""
    commit = get_hf_file_metadata(hf_hub_url(repo_id, CONFIG, revision=revision)).commit_hash
    if commit is None:
        raise HubError(
            f"{constants.ENDPOINT} does not answer like a model hub (no commit hash). Check HF_ENDPOINT and proxies."
        )
    config = try_to_load_from_cache(repo_id, CONFIG, revision=revision)
    if not isinstance(config, str) or Path(config).parent.name != commit:
        # with the branch, not the commit: the cache then remembers which commit the branch is at
        config = hf_hub_download(repo_id, CONFIG, revision=revision)
    folder = Path(config).parent
    commit = folder.name
    if _cached(repo_id, commit, weights) is not None:
        return folder
    _fetch(repo_id, commit, PREPROCESSOR)
    if not weights:
        return folder
    for name in WEIGHTS:
        if _fetch(repo_id, commit, name):
            for shard in _shards(folder / name):
                if not _fetch(repo_id, commit, shard):
                    raise HubError(
                        f'{repo_id} names the shard "{shard}" in {name} and does not hold it: the upload is '
                        "incomplete. Try another revision, or tell its authors."
                    )
            return folder
    raise HubError(
        f"{repo_id} has no weights that opsin reads.{_holdings(repo_id, commit)} Right would be one of "
        f"{', '.join(WEIGHTS)}. `opsin models --hub` lists models that have them."
    )


def _shards(path: Path) -> list[str]:
    """File names in an index, in order; none for a file that is whole itself."""
    if not path.name.endswith(".index.json"):
        return []
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f'{path} is not an index of shards: JSON with a "weight_map" from names to files.'
        ) from error
    for shard in shards:
        if not SHARD.fullmatch(str(shard)):
            raise CheckpointError(f'{path} names "{shard}", which is not a weight file beside it. Do not trust it.')
    return shards


def _fetch(repo_id: str, commit: str, name: str) -> bool:
    """Bring one file into the cache; False when the hub states that there is none."""
    try:
        if name.endswith((".safetensors", ".bin")):
            _transfer(repo_id, commit, name)
        hf_hub_download(repo_id, name, revision=commit)
    except LocalEntryNotFoundError:  # not reached, although it is a kind of EntryNotFoundError
        raise
    except EntryNotFoundError:
        return False
    return True


def _transfer(repo_id: str, commit: str, name: str) -> None:
    """Bring the content of a large file into the cache's blobs, going on where a cut transfer stopped.

    huggingface_hub 2 itself goes on only within one process. The partial file has the name that its older versions
    give it; `hf_hub_download` finds the whole one and links it.
    """
    url = hf_hub_url(repo_id, name, revision=commit)
    metadata = get_hf_file_metadata(url)
    if metadata.etag is None or not SHA256.fullmatch(metadata.etag) or metadata.size is None:
        return  # a small file kept in git: nothing to resume
    repo = repo_folder_name(repo_id=repo_id, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE, repo, "blobs", metadata.etag)
    lock = Path(constants.HF_HUB_CACHE, ".locks", repo, f"{metadata.etag}.lock")
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        partial = blob.with_name(f"{metadata.etag}.incomplete")
        with partial.open("ab") as file:
            have = file.tell()
            free = shutil.disk_usage(blob.parent).free
            if metadata.size - have > free:
                raise OSError(errno.ENOSPC, f"{_size(metadata.size - have)} to fetch, {_size(free)} free", str(partial))
            if have:
                log.info("Going on with %s of %s at %s of %s", name, repo_id, _size(have), _size(metadata.size))
            http_get(
                url,
                file,
                resume_size=have,
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},  # gzip and Range do not go together
                expected_size=metadata.size,
                displayed_filename=name,
            )
        with partial.open("rb") as file:
            hasher = hashlib.sha256()
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
        digest = hasher.hexdigest()
        if digest != metadata.etag:
            partial.unlink()
            raise HubError(
                f"{name} of {repo_id} arrived damaged: sha256 {digest}, the hub states {metadata.etag}. It was thrown "
                "away; try again, or another mirror (HF_ENDPOINT)."
            )
        partial.replace(blob)


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps the reason why the hub was not reached in "not found locally"."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain(error: Exception, repo_id: str, revision: str) -> ModelError:
    """An error of the transport in the user's words: what is wrong, what would be right, what to do next."""
    cause = _cause(error)
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(cause, GatedRepoError):
        remedy = "This HF_TOKEN has no access yet" if get_token() else "Then create a token and set HF_TOKEN"
        return HubError(f"{repo_id} is gated: accept its terms at {hub}/{repo_id}. {remedy}.")
    if isinstance(cause, RepositoryNotFoundError):
        return UnknownModel(
            f'no model "{repo_id}" on {hub}, or it is private (then set HF_TOKEN).{_did_you_mean(repo_id)} '
            "`opsin models` lists all."
        )
    if isinstance(cause, RevisionNotFoundError):
        return UnknownModel(f'{repo_id} has no revision "{revision}".{_revisions(repo_id)}')
    if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        return HubError(
            f"{repo_id} has no {CONFIG}, so its shape is unknown.{_holdings(repo_id, revision)} "
            "`opsin models --hub` lists models that have one."
        )
    if isinstance(cause, OfflineModeIsEnabled):
        return HubError(
            f"{repo_id} ({revision}) is not whole in the cache ({cache}) and HF_HUB_OFFLINE forbids to fetch it. "
            "Fetch it once without HF_HUB_OFFLINE, or give the path of a local copy instead of its name."
        )
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return HubError(
            f"no room for {repo_id} in {cache}: {cause.strerror}. Free some space, or set HF_HOME to a larger disk; "
            "what has arrived is kept."
        )
    if isinstance(cause, PermissionError):
        return HubError(f"cannot write to the cache: {cause}. Set HF_HOME to a folder that is yours.")
    response = getattr(cause, "response", None)
    status = None if response is None else response.status_code
    if status == 401:
        return HubError(f"{hub} refused the token for {repo_id} (401). Set HF_TOKEN to a valid one, or unset it.")
    if status == 429:
        return HubError(f"{hub} asks to slow down (429). Wait a few minutes, or set HF_TOKEN for a higher limit.")
    return HubError(
        f"{hub} could not be reached for {repo_id} ({_said(cause)}), and the cache ({cache}) does not hold all of it. "
        "Check the connection and proxies and run again: a cut transfer goes on where it stopped. Or use a mirror, "
        "e.g. HF_ENDPOINT=https://hf-mirror.com, or give the path of a local copy instead of the name."
    )


def _said(error: BaseException) -> str:
    """An error of the transport in a few words."""
    response = getattr(error, "response", None)
    return f"{type(error).__name__}: {error}".splitlines()[0] if response is None else f"status {response.status_code}"


def _did_you_mean(repo_id: str) -> str:
    near = [f'"{name}"' for name in nearest(repo_id)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _holdings(repo_id: str, revision: str) -> str:
    """What the repo does hold, for an error message; empty when the hub will not say."""
    try:
        files = HfApi().model_info(repo_id, revision=revision).siblings or []
    except TRANSPORT_ERRORS:
        return ""
    return _listed("It holds", [file.rfilename for file in files])


def _revisions(repo_id: str) -> str:
    """The branches and tags of a repo, for an error message; empty when the hub will not say."""
    try:
        refs = HfApi().list_repo_refs(repo_id)
    except TRANSPORT_ERRORS:
        return ""
    return _listed("It has", [ref.name for ref in (*refs.branches, *refs.tags)])


def _listed(verb: str, names: list[str]) -> str:
    return f" {verb} {', '.join(names[:12])}{', …' if len(names) > 12 else ''}." if names else ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
