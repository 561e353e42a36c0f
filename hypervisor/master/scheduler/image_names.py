"""Names of images, made comparable."""

from __future__ import annotations


def full_name(image: str) -> str:
    """A reference with the registry and tag that it stands for, as nodes list their images: ``busybox`` is
    ``docker.io/library/busybox:latest``.
    """
    first, slash, _ = image.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        image = f"docker.io/{image}" if slash else f"docker.io/library/{image}"
    return image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"
