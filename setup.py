"""Builds the extensions; everything else about the package is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

# DISKREAD_CFLAGS/DISKREAD_LDFLAGS add to the build: the sanitizer build of the tests uses them.
extensions = [
    Extension(
        f"diskread.{name}",
        [f"src/diskread/{name.replace('.', '/')}.pyx"],
        depends=["src/diskread/_open_cached.h", "src/diskread/_page_cache.h"],
        include_dirs=["src/diskread"],
        extra_compile_args=["-O2", "-Wall", "-Wextra", *os.environ.get("DISKREAD_CFLAGS", "").split()],
        extra_link_args=os.environ.get("DISKREAD_LDFLAGS", "").split(),
    )
    for name in ("_cached", "_engine", "_syscalls", "swift._object")
]

setup(ext_modules=cythonize(extensions, compiler_directives={"language_level": 3}))
