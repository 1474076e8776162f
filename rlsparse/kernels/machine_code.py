"""Machine code of the CPU kernels, compiled once per machine and then loaded in milliseconds.

The kernels are written in Python (``cpu``) and compiled by numba for this very processor. numba
takes a second to import and several to compile, so the object code is kept in
``$XDG_CACHE_HOME/rlsparse`` (or ``$RLSPARSE_CACHE_DIR``), under a name that changes with the
source, the compilers and the processor. Later processes load it with llvmlite alone. Without a
cache that this user alone can write, or with a damaged file, a process compiles anew.
"""

import ctypes
import hashlib
import os
import threading
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from rlsparse.cache import cache_folder
from rlsparse.errors import RlsparseWarning
from rlsparse.tensor_file import atomic_write

_SOURCES = (
    "counting.py", "cpu.py", "formats.py", "layout.py", "machine_code.py", "packed_vectors.py",
    "packing.py", "patching.py", "vectors.py",
)  # fmt: skip


_one_at_a_time = threading.RLock()  # neither LLVM's engine nor numba may be entered twice


def load(name: str, num_pointers: int, num_integers: int = 0) -> Callable[..., None]:
    """A kernel of ``cpu``, ``counting``, ``packing`` or ``patching``, which releases the GIL.

    Args:
        name: of the kernel.
        num_pointers: its arguments that are addresses of array data; they come first.
        num_integers: the int64 arguments after them.
    """
    with _one_at_a_time:
        return _load(name, num_pointers, num_integers)


@cache
def _load(name: str, num_pointers: int, num_integers: int) -> Callable[..., None]:
    file = cache_folder() / f"{name}-{_key()}.o"
    code = _kept(file)
    if code is None:
        code = _compile(name)
        _keep(file, code)
        if _kept(file) is None:
            warnings.warn(
                f"kernels are compiled again in every process: {file.parent} cannot be used, or "
                "others may write it; set RLSPARSE_CACHE_DIR to a folder of your own",
                RlsparseWarning,
                stacklevel=3,
            )
    engine = _engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(name)
    arguments = [ctypes.c_void_p] * num_pointers + [ctypes.c_int64] * num_integers
    # numba's convention: where to put a result, where to put an exception; ours have neither.
    native = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, *arguments)(address)
    nothing = (ctypes.c_void_p * 2)()
    spare = ctypes.addressof(nothing)

    def call(*given: int) -> None:
        native(spare, spare + ctypes.sizeof(ctypes.c_void_p), *given)

    call.__dict__["keep_alive"] = nothing
    return call


@cache
def _engine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


@cache
def _key() -> str:
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update(Path(__file__).with_name(source).read_bytes())
    features = llvm.get_host_cpu_features().flatten()
    parts = (version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), features)
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:16]


def _kept(file: Path) -> bytes | None:
    """The code in ``file``, if it is whole, and only this user or root could have written it."""
    try:
        with file.open("rb") as stream:
            status, folder = os.fstat(stream.fileno()), file.parent.stat()
            content = stream.read()
    except OSError:
        return None
    if hasattr(os, "getuid"):
        owners = {status.st_uid, folder.st_uid}
        if not owners <= {0, os.getuid()} or (status.st_mode | folder.st_mode) & 0o022:
            return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(file: Path, code: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_write(file) as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write(hashlib.sha256(code).digest() + code)
    except OSError:
        return  # read-only home: the next process compiles again


def _compile(name: str) -> bytes:
    """Object code that needs nothing of numba's runtime."""
    from numba import njit

    from rlsparse.kernels import counting, cpu, packing, patching

    exact = packing.KERNELS | patching.KERNELS  # bits are the contract
    function, signature = (cpu.KERNELS | counting.KERNELS | exact)[name]()
    compiled = njit(
        signature, error_model="numpy",
        fastmath=False if name in exact else cpu.FASTMATH,
        no_cpython_wrapper=True, no_cfunc_wrapper=True,
    )(function)  # fmt: skip
    module = llvm.parse_assembly(compiled.inspect_llvm(compiled.signatures[0]))
    own = [part for part in module.functions if not part.is_declaration]
    (kernel,) = (part for part in own if part.linkage == llvm.Linkage.external)
    kernel.name = name
    for part in own:
        if part.name != name:
            part.linkage = llvm.Linkage.internal
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3,
        jit=True,
    )  # fmt: skip
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    passes.run(module, builder)
    return bytes(machine.emit_object(module))
