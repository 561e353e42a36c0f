"""The one thing that setup.cfg cannot say: which C extensions cffi builds."""

from setuptools import setup

setup(
    cffi_modules=[
        "csrc/vsock/cffi_build.py:ffibuilder",
        "csrc/memory/cffi_build.py:ffibuilder",
        "csrc/percpu/cffi_build.py:ffibuilder",
        "csrc/iofilter/cffi_build.py:ffibuilder",
    ]
)
