"""Where the emoji art comes from: archives of the npm registry by name, version and sha512, cached in a folder.

Licences: Fluent Emoji (Microsoft) MIT, as packaged by LobeHub and Iconify (MIT); emojibase (MIT). Their texts and
credits stand beside the model.
"""

import base64
import hashlib
import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ... import disk

REGISTRY = "https://registry.npmjs.org"


@dataclass(frozen=True)
class Package:
    """An archive. sha512: base64, as the registry states it."""

    name: str
    version: str
    sha512: str

    @property
    def file_name(self) -> str:
        """As `npm pack` calls it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def url(self) -> str:
        base = os.environ.get("NPM_CONFIG_REGISTRY", REGISTRY).rstrip("/")
        return f"{base}/{self.name}/-/{self.name.rsplit('/', 1)[-1]}-{self.version}.tgz"


FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
)
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
PACKAGES = (FLUENT_3D, FLUENT_FLAT, EMOJIBASE)


def archive(package: Package, cache: Path) -> Path:
    """The archive in the cache, downloaded where it is missing. Raises OSError, ValueError for another content."""
    path = cache / package.file_name
    if not path.is_file():
        try:
            with urllib.request.urlopen(package.url, timeout=60) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:  # the second where it breaks off
            raise OSError(
                f"{path}: cannot fetch {package.url} ({error}); put the archive there (npm pack {package.name}@"
                f"{package.version}) to work without a network"
            ) from None
        with disk.replacing(path) as temporary:
            temporary.write_bytes(content)
    if base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode() != package.sha512:
        raise ValueError(f"{path} is not {package.name} {package.version}: another sha512; delete it")
    return path
