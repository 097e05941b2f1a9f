"""What a server is told when it is started."""

from dataclasses import dataclass

from opsin.pipeline import DEFAULT_MODEL
from opsin.preprocess import Decode
from opsin.serve.fetch import parse_allowed

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Models, limits and keys; the defaults are those of `opsin serve`.

    Raises:
        ValueError: a limit below 1, no model, two models of one name, an empty key, or no host to fetch from.
    """

    models: tuple[str, ...] = (DEFAULT_MODEL,)  # what `opsin.load` takes, or NAME=that; the first is the default one
    dtype: str = "auto"
    engine: str = "auto"
    device: str = "auto"
    decode: Decode = "exact"
    lazy: bool = False  # load a model when it is first asked for, not at the start
    max_memory_bytes: int | None = None  # of all models together; the one not used for longest goes first

    max_batch: int = 32  # images that are computed together
    max_wait_ms: float = 2.0  # for more of them, while other requests are arriving
    max_queue: int = 1024  # images that wait for one model
    max_items: int = 256  # images of one request
    max_body_bytes: int = 32 * MIB
    max_pixels: int = 50_000_000  # of one image, decoded
    body_seconds: float = 30.0  # from the first byte of a request to its last

    api_keys: tuple[str, ...] = ()  # one of these opens the server; none: everyone may
    cors_origins: tuple[str, ...] = ()
    allow_url_hosts: tuple[str, ...] = ()  # hosts that images may be fetched from

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_items", "max_body_bytes", "max_pixels", "body_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_wait_ms < 0:
            raise ValueError(f"max_wait_ms is {self.max_wait_ms}; it must be at least 0.")
        if not self.models:
            raise ValueError("no model. Name at least one.")
        if not all(self.api_keys):
            raise ValueError("an API key is empty. Give each at least one character; without any, the server is open.")
        for host in self.allow_url_hosts:
            parse_allowed(host)
        self.sources  # noqa: B018, it checks the names

    @property
    def sources(self) -> dict[str, str]:
        """Name in requests → what `opsin.load` takes, in the order given."""
        found: dict[str, str] = {}
        for model in self.models:
            name, _, source = model.rpartition("=")
            name = (name or source).strip("/")
            if not name or not source:
                raise ValueError(f'"{model}" is not a model. Write NAME=SOURCE, or the source alone.')
            if name in found:
                raise ValueError(f'two models are called "{name}". Name one of them otherwise: OTHER={source}')
            found[name] = source
        return found
