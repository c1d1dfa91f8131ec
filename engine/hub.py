"""Single files of models on the Hugging Face hub, the local cache first.

Reached only where the user named a hub model. What the cache knows, also that a file does not exist, is not asked for
again: a model that was loaded once loads without a network, and stays the same until the cache is cleared.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from engine.errors import ModelError

# What the hub's client raises where a download breaks off: of whichever HTTP library it uses, and the system's own.
BROKEN_OFF: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)  # type: ignore[assignment]


class HubRepository:
    """One model repository.

    Parameters
    ----------
    name : str
        Such as ``microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224``.

    Attributes
    ----------
    unreachable : Unreachable or None
        What went wrong when the hub was asked last; from then on only the cache is.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.unreachable: Unreachable | None = None

    def find(self, filename: str) -> Path | None:
        """Return a file's local path, downloaded if need be; None where the repository has no such file.

        Raises
        ------
        ModelError
            There is no such repository, it is not open to the user, or nothing is cached and the hub cannot be reached.
        """
        try:
            cached = huggingface_hub.try_to_load_from_cache(self.name, filename)
            if isinstance(cached, str):
                return Path(cached)
            if cached is not None or self.unreachable is not None:
                return None
            return Path(huggingface_hub.hf_hub_download(self.name, filename))
        except HFValidationError as error:
            raise ModelError(f"{self.name!r} is not the name of a hub repository (OWNER/NAME): {error}") from None
        except GatedRepoError:
            raise ModelError(
                f"hub repository {self.name!r} asks for its terms to be accepted: do so on its page, then "
                "`hf auth login` on this machine"
            ) from None
        except RepositoryNotFoundError:
            raise ModelError(
                f"the hub has no model repository {self.name!r}, or it is private; check the name, or `hf auth login`"
            ) from None
        except LocalEntryNotFoundError as error:
            # asked once, not once a file: the hub's client tries for half a minute
            self.unreachable = Unreachable(self.name, filename, error, self.interrupted_bytes)
            raise self.unreachable from None
        except EntryNotFoundError:
            return None
        except BROKEN_OFF as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"the download of {filename!r} from hub repository {self.name!r} was interrupted "
                f"({reason}){self._kept()}; the same command goes on with it"
            ) from error

    def _kept(self) -> str:
        """Return a clause on what an interrupted download has left."""
        size = self.interrupted_bytes
        return f"; {size / 1e6:.1f} MB of an unfinished file are kept" if size else ""

    @property
    def interrupted_bytes(self) -> int:
        """Bytes of files whose download was begun and not finished."""
        folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}" / "blobs"
        return sum(path.stat().st_size for path in folder.glob("*.incomplete")) if folder.is_dir() else 0

    def require(self, filename: str) -> Path:
        """Return a file's local path; ModelError where the repository has no such file."""
        path = self.find(filename)
        if path is None:
            raise ModelError(f"hub repository {self.name!r} has no file {filename!r}, so it is not an open_clip model")
        return path

    def find_all(self, filenames: tuple[str, ...]) -> list[Path]:
        """Return the paths of those files that exist; where the hub cannot be reached, of those that are cached."""
        found = []
        for filename in filenames:
            try:
                path = self.find(filename)
            except Unreachable:
                continue
            if path is not None:
                found.append(path)
        return found


class Unreachable(ModelError):
    """A file is not cached and the hub does not answer."""

    def __init__(self, repository: str, filename: str, error: Exception, interrupted_bytes: int = 0) -> None:
        begun = f"; a download was interrupted, {interrupted_bytes / 1e6:.1f} MB of it are there"
        super().__init__(
            f"{filename!r} of hub repository {repository!r} is not cached on this machine and the hub cannot be "
            f"reached ({type(error.__cause__ or error).__name__}){begun if interrupted_bytes else ''}."
            " Where there is a network, `fluoro model pack "
            "hf-hub:OWNER/NAME FOLDER` writes a folder that loads here as local-dir:FOLDER"
        )
