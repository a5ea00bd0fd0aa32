"""Build of the C library and of ``kimi_linear._core``: the one place that knows flags and sources.

    python setup.py build_ext --inplace     the extension module, next to the Python files
    python setup.py lib                     build/lib: static and shared library, header, pkg-config file

Both share their objects (build/obj/<variant>), compiled in parallel, and again only when a source, a header
or a flag has changed.  Settings come from the environment:

    CC            C compiler; a cross compiler builds for its      KL_JOBS      compilations at once
                  machine: lib, not build_ext; AR goes with it
    CPPFLAGS, CFLAGS, LDFLAGS   before the flags of this file, which prevail: -O, fast math and LTO are not the caller's
    KL_BLAS       auto | pkg-config | scipy | none                 KL_WERROR=1  warnings are errors
    KL_SANITIZE   address,undefined | thread                       KL_DEBUG=1   asserts, NaN-filled scratch
"""

import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "kimi_linear/_version.py").read_text())[1]
ABI_VERSION = VERSION.split(".")[0]  # of the shared library's name

LIBRARY = ["csrc/*.c", "csrc/ops/*.c", "csrc/cpu/*.c", "csrc/quant/*.c", "csrc/model/*.c"]
BINDING = ["csrc/python/*.c"]
PUBLIC = ["csrc/kimi_linear*.h"]

COMMON = """
    -std=c11 -g1 -fPIC -pthread -fvisibility=hidden -fno-lto
    -fno-fast-math -ffp-contract=off -fno-math-errno
    -Wall -Wextra -Wshadow -Wdouble-promotion -Wconversion -Wvla
""".split()
STACK = "-Wframe-larger-than=65536"  # threads have 512 KiB on macOS
AVX2 = "-mavx2 -mfma -mf16c".split()
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mprefer-vector-width=512".split()
ISA = {  # by machine; the files of another are empty
    "csrc/cpu/isa_scalar.c": {},
    "csrc/cpu/isa_avx2.c": {"x86_64": AVX2},
    "csrc/cpu/isa_avxvnni.c": {"x86_64": [*AVX2, "-mavxvnni"]},
    "csrc/cpu/isa_avxvnni_evex.c": {"x86_64": [*AVX2, "-mavx512vl", "-mavx512vnni"]},
    "csrc/cpu/isa_avx512.c": {"x86_64": AVX512},
    "csrc/cpu/isa_avx512bf16.c": {"x86_64": [*AVX512, "-mavx512bf16"]},
    "csrc/cpu/isa_neon.c": {},
    "csrc/cpu/isa_neon_dotprod.c": {"aarch64": ["-march=armv8.2-a+dotprod"]},  # Apple silicon has it without a flag
}

NAMES = {"arm64": "aarch64", "amd64": "x86_64"}  # other names of machines
MACOS = "11.0"  # the first on Apple silicon, and the oldest for which OpenBLAS has wheels of both machines
INSTALL = "as root: apt-get install -y gcc libc6-dev python3-dev"
if sys.platform == "darwin":
    INSTALL = "xcode-select --install"


def env_flag(name):
    return os.environ.get(name, "") not in ("", "0")


def env_words(*names):
    """The words of variables as a shell would split them, those of each behind the last."""
    words = []
    for name in names:
        try:
            words += shlex.split(os.environ.get(name, ""))
        except ValueError as error:
            fail(f"{name} is {os.environ[name]!r}, which is not words of a shell: {error}.")
    return words


def env_jobs():
    """Compilations at once: $KL_JOBS, else one a processor."""
    said = os.environ.get("KL_JOBS", "") or "0"
    if not said.isdecimal():
        fail(f"KL_JOBS is {said!r}; it must be a number, 0 for one a processor.")
    return int(said) or os.cpu_count()


def fail(sentence):
    sys.exit(f"kimi_linear: {sentence}")


def glob(patterns):
    return sorted(path.relative_to(ROOT).as_posix() for p in patterns for path in ROOT.glob(p))


def check_platform(machine, system):
    if system not in ("linux", "darwin") or machine not in ("x86_64", "aarch64"):
        fail(f"this is {system} on {machine}; it builds for Linux and macOS, on x86-64 and aarch64 (arm64).")


def compiler():
    """The C compiler as a list of words: $CC, else the first of cc, gcc and clang."""
    words = env_words("CC")
    if words:
        if shutil.which(words[0]):
            return words
        fail(f"CC is {os.environ['CC']!r}, which is not a command; unset it or name a C compiler.")
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    fail(f"there is no C compiler; {INSTALL}")


def target_of(cc):
    """The machine and the system that `cc` compiles for; those here where it does not say."""
    asked = subprocess.run([*cc, "-dumpmachine"], capture_output=True, text=True)
    machine, _, system = asked.stdout.strip().partition("-")
    if not machine:
        return here()
    known = [("linux", "linux"), ("darwin", "darwin"), ("macos", "darwin")]
    return NAMES.get(machine, machine), next((name for word, name in known if word in system), system)


def here():
    machine = platform.machine().lower()
    return NAMES.get(machine, machine), sys.platform


def python_include():
    folder = sysconfig.get_paths()["include"]
    if not Path(folder, "Python.h").exists():
        fail(f"{folder}/Python.h is missing; {INSTALL}")
    return folder


# BLAS: an optional second provider of the matrix product.


@dataclass(frozen=True)
class Blas:
    """How to compile against a BLAS (only gemm.c sees `cflags`) and how to link it."""

    name: str
    defines: tuple = ()
    cflags: tuple = ()
    libs: tuple = ()
    folder: Path | None = None  # of a shared library that the loader does not find by itself
    soname: str | None = None
    licences: tuple = ()
    pc_requires: str = ""


def blas_pkg_config():
    tool = shutil.which("pkg-config")
    if not tool or subprocess.run([tool, "--exists", "openblas"]).returncode:
        return None

    def ask(*what):
        return subprocess.check_output([tool, *what, "openblas"], text=True).strip()

    cflags = tuple(flag.replace("-I", "-isystem", 1) for flag in shlex.split(ask("--cflags")))
    libs = tuple(shlex.split(ask("--libs")))
    return Blas(f"OpenBLAS {ask('--modversion')} (pkg-config)", (), cflags, libs, pc_requires="openblas")


def blas_scipy():
    try:
        import scipy_openblas32 as wheel
    except ImportError:
        return None
    from importlib.metadata import files, version

    release = version("scipy-openblas32")
    folder, library = Path(wheel.get_lib_dir()), wheel.get_library()
    licences = tuple(f.locate() for f in files("scipy-openblas32") or () if "licenses" in f.parts)
    return Blas(
        f"OpenBLAS {release} (scipy-openblas32)",
        ("-DKL_CBLAS_PREFIX=scipy_",),
        (f"-isystem{wheel.get_include_dir()}",),
        (f"-L{folder}", f"-l{library}"),
        folder=folder,
        soname=f"lib{library}.{'dylib' if sys.platform == 'darwin' else 'so'}",
        licences=tuple(Path(f) for f in licences),
    )


def find_blas():
    choice = os.environ.get("KL_BLAS", "auto")
    providers = {"pkg-config": blas_pkg_config, "scipy": blas_scipy}
    if choice == "none":
        return Blas("none", ("-DKL_NO_BLAS",))
    if choice == "auto":
        return blas_pkg_config() or blas_scipy() or Blas("none", ("-DKL_NO_BLAS",))
    if choice not in providers:
        fail(f"KL_BLAS is {choice!r}; it must be auto, pkg-config, scipy or none.")
    found = providers[choice]()
    if found is None:
        remedy = {
            "pkg-config": "as root: apt-get install -y pkg-config libopenblas-dev",
            "scipy": "pip install scipy-openblas32",
        }
        fail(f"KL_BLAS is {choice!r} and that OpenBLAS is not installed; {remedy[choice]}")
    return found


# Compiling and linking.


def check_version():
    header = (ROOT / "csrc/kimi_linear.h").read_text()
    if f'#define KL_VERSION "{VERSION}"' not in header:
        fail(f"kimi_linear/_version.py says {VERSION}; KL_VERSION in csrc/kimi_linear.h must say the same.")


class Toolchain:
    """Compiler, flags and folders of one variant of the build (release, werror, debug, sanitised)."""

    def __init__(self):
        self.cc = compiler()
        if sys.platform == "darwin" and not {"-arch", "-target"} & set(self.cc):
            self.cc += ["-arch", platform.machine()]  # Python's, which may be another than the processor's
        self.machine, self.system = target_of(self.cc)
        check_platform(self.machine, self.system)
        check_version()
        self.macos = self.system == "darwin"
        self.foreign = (self.machine, self.system) != here()
        self.blas = find_blas()
        self.sanitize = os.environ.get("KL_SANITIZE", "")
        self.debug = bool(self.sanitize) or env_flag("KL_DEBUG")
        self.werror = env_flag("KL_WERROR")
        other = self.machine + "-macos" * self.macos if self.foreign else ""
        words = [other, self.sanitize.replace(",", "-"), "debug" * self.debug, "werror" * self.werror]
        self.variant = "-".join(filter(None, words)) or "release"
        self.objects = ROOT / "build/obj" / self.variant
        self.lib = ROOT / "build" / ("lib" if self.variant == "release" else f"lib-{self.variant}")

    def flags(self, source):
        """Every compiler flag of one source file, in order."""
        level = "-O1" if self.sanitize else "-O3" if source in ISA else "-O2"
        flags = [*env_words("CPPFLAGS", "CFLAGS"), *COMMON, level, "-Icsrc", f'-DKL_BLAS_NAME="{self.blas.name}"']
        flags += self.blas.defines
        flags += [f"-mmacosx-version-min={MACOS}"] if self.macos else []
        flags += ["-DKL_DEBUG"] if self.debug else ["-DNDEBUG"]
        flags += ["-Werror"] if self.werror else []
        if self.sanitize:
            flags += [f"-fsanitize={self.sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        else:
            flags += [STACK]
        if not (self.macos and self.machine == "aarch64"):
            flags += ISA.get(source, {}).get(self.machine, [])
        if source == "csrc/cpu/gemm.c":
            flags += self.blas.cflags
        if source.startswith("csrc/python/"):
            flags += ["-DPy_LIMITED_API=0x030B0000", f"-isystem{python_include()}"]
        return flags

    def link_flags(self):
        system = [f"-mmacosx-version-min={MACOS}"] if self.macos else ["-pthread"]
        return ["-shared", *system] + ([f"-fsanitize={self.sanitize}"] if self.sanitize else [])

    def compile(self, sources):
        """Objects of `sources`, brought up to date; all errors are shown, not only the first."""
        jobs = [(source, self._object(source), self._command(source)) for source in sources]
        stale = [job for job in jobs if not self._is_fresh(*job[1:])]
        if stale:
            what = f"{len(stale)} of {len(jobs)} files ({self.variant}; BLAS: {self.blas.name})"
            print(f"compiling {what}", flush=True)
        with ThreadPoolExecutor(env_jobs()) as pool:
            failed = [source for source, ok in pool.map(self._compile_one, stale) if not ok]
        if failed:
            fail(f"the compiler rejected {', '.join(failed)}.")
        return [str(obj) for _, obj, _ in jobs]

    def _object(self, source):
        return self.objects / Path(source).relative_to("csrc").with_suffix(".o")

    def _command(self, source):
        obj = self._object(source)
        read = ["-MMD", "-MT", "it", "-MF", str(obj.with_suffix(".d"))]
        return [*self.cc, *self.flags(source), *read, "-c", source, "-o", str(obj)]

    @staticmethod
    def _is_fresh(obj, command):
        record, read = obj.with_suffix(".cmd"), obj.with_suffix(".d")
        if not all(path.exists() for path in (obj, record, read)) or record.read_text() != shlex.join(command):
            return False
        made_of = read.read_text().replace("\\\n", " ").removeprefix("it:").split()  # source, headers
        return not is_older(obj, [ROOT / path for path in made_of])

    @staticmethod
    def _compile_one(job):
        source, obj, command = job
        obj.parent.mkdir(parents=True, exist_ok=True)
        obj.with_suffix(".cmd").unlink(missing_ok=True)
        started = time.time()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        sys.stderr.write(done.stdout)
        if done.returncode == 0:
            os.utime(obj, (started, started))  # what was edited meanwhile is newer
            obj.with_suffix(".cmd").write_text(shlex.join(command))
        return source, done.returncode == 0

    def link(self, target, objects, extra):
        """Link to a new file, then rename it: a process that has the old one mapped keeps it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        flags = [*env_words("LDFLAGS"), *self.link_flags()]
        self.run([*self.cc, *flags, *objects, *self.blas.libs, "-lm", "-ldl", *extra, "-o", str(fresh)])
        os.replace(fresh, target)

    def program(self, name):
        """$AR and the like, else the compiler's own `name`: a cross compiler's is another than this machine's."""
        if words := env_words(name.upper()):
            return words
        asked = subprocess.run([*self.cc, f"-print-prog-name={name}"], capture_output=True, text=True)
        return [asked.stdout.strip() or name]

    @staticmethod
    def run(command):
        if subprocess.run(command, cwd=ROOT).returncode:
            fail(f"this command failed: {shlex.join(command)}")


def locked(body):
    """Run `body` while no other build of this tree runs."""
    check_platform(*here())
    import fcntl  # which Windows has not

    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        body()


def is_older(target, inputs):
    """Whether it is missing, older than one of them, or made of one that is gone."""
    changed = [path.stat().st_mtime if path.exists() else math.inf for path in map(Path, inputs)]
    return not target.exists() or target.stat().st_mtime <= max(changed)


class BuildPython(build_py):
    """The Python files, into an empty folder: what was removed from the tree is in no package."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtension(build_ext):
    """``kimi_linear._core``, with the library linked in and nothing but its init function exported."""

    def run(self):
        locked(self._build)

    def _build(self):
        tools = Toolchain()
        if not glob(LIBRARY) or not glob(BINDING):
            print("csrc/ holds no extension module: none is built", file=sys.stderr)
            return
        objects = tools.compile(glob(LIBRARY) + glob(BINDING))
        folder = ROOT if self.inplace else Path(self.build_lib).resolve()
        target = folder / self.get_ext_filename(self.extensions[0].name)
        if not self.inplace or is_older(target, objects) or self._variant_changed(target, tools):
            tools.link(target, objects, [*self._exports(tools), *self._blas_at_run_time(tools, target)])

    @staticmethod
    def _exports(tools):
        if tools.macos:  # -shared makes a dylib, which Python loads as it does a bundle
            name = "-Wl,-install_name,@rpath/_core.abi3.so"
            only = [] if tools.foreign else ["-Wl,-exported_symbol,_PyInit__core"]  # of the linkers only zig's lacks it
            return ["-Wl,-undefined,dynamic_lookup", name, *only]
        script = tools.objects / "core.map"
        script.write_text("{ global: PyInit__core; local: *; };\n")
        return [f"-Wl,--version-script={script}"]

    def _blas_at_run_time(self, tools, target):
        """A tree finds the wheel's library where it is installed; a package carries it."""
        blas = tools.blas
        if blas.folder is None:
            return []
        if self.inplace:
            return [f"-Wl,-rpath,{blas.folder}"]
        carried = target.parent / "_openblas"
        carried.mkdir(parents=True, exist_ok=True)
        for path in (blas.folder / blas.soname, *blas.licences):
            shutil.copy2(path, carried)
        return [f"-Wl,-rpath,{'@loader_path' if tools.macos else '$ORIGIN'}/_openblas"]

    @staticmethod
    def _variant_changed(target, tools):
        """The file in the tree may be another variant's, or linked against another BLAS."""
        record = ROOT / "build/inplace.txt"
        now = f"{target}\n{tools.variant}\n{tools.blas}\n{os.environ.get('LDFLAGS', '')}\n"
        changed = not record.exists() or record.read_text() != now
        record.write_text(now)
        return changed


class BuildLibrary(Command):
    """``python setup.py lib``: the C library for programs that know no Python."""

    description = "build the C library, static and shared, with its header and pkg-config file"
    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        locked(self._build)

    def _build(self):
        tools = Toolchain()
        objects = tools.compile(glob(LIBRARY))
        if not objects:
            fail("csrc/ holds no C files.")
        full, major, plain = self._names(tools)
        shared = tools.lib / full
        static = tools.lib / "libkimi_linear.a"
        if is_older(shared, [*objects, __file__]):
            self._shared(tools, shared, objects, major, plain)
        if is_older(static, [*objects, __file__]):
            self._static(tools, static, objects)
        self._describe(tools)
        print(f"{tools.lib.relative_to(ROOT)}: libkimi_linear.a, {plain}, include/, kimi_linear.pc")

    @staticmethod
    def _names(tools):
        """The shared library's: with its version, with that of its ABI, and plain, which a linker looks for."""
        versions = (VERSION, ABI_VERSION)
        if tools.macos:
            return (*(f"libkimi_linear.{v}.dylib" for v in versions), "libkimi_linear.dylib")
        return (*(f"libkimi_linear.so.{v}" for v in versions), "libkimi_linear.so")

    @staticmethod
    def _shared(tools, target, objects, major, plain):
        rpath = [f"-Wl,-rpath,{tools.blas.folder}"] if tools.blas.folder else []
        undefined = [] if tools.sanitize or tools.macos else ["-Wl,-z,defs"]  # on macOS they are errors anyway
        name = f"-Wl,-install_name,@rpath/{major}" if tools.macos else f"-Wl,-soname,{major}"
        tools.link(target, objects, [name, *undefined, *rpath])
        for name in (major, plain):
            link = target.with_name(name)
            link.unlink(missing_ok=True)
            link.symlink_to(target.name)

    @staticmethod
    def _static(tools, target, objects):
        """One object whose hidden symbols are local, so that they cannot clash with a program's."""
        merged = tools.objects / "kimi_linear.o"
        target.unlink(missing_ok=True)
        if tools.macos:  # where -r makes them local
            tools.run([*tools.cc, "-r", "-nostdlib", "-o", str(merged), *objects])
        else:
            tools.run([*tools.program("ld"), "-r", "-o", str(merged), *objects])
            tools.run([*tools.program("objcopy"), "--localize-hidden", str(merged)])
        tools.run([*tools.program("ar"), "rcs", str(target), str(merged)])

    @staticmethod
    def _describe(tools):
        (tools.lib / "include").mkdir(parents=True, exist_ok=True)
        for header in glob(PUBLIC):
            shutil.copy2(ROOT / header, tools.lib / "include")
        blas_libs = list(tools.blas.libs) if not tools.blas.pc_requires else []
        if tools.blas.folder:
            blas_libs.append(f"-Wl,-rpath,{tools.blas.folder}")
        values = {
            "version": VERSION,
            "blas": tools.blas.name,
            "requires": tools.blas.pc_requires,
            "blas_libs": shlex.join(blas_libs),
        }
        text = (ROOT / "csrc/kimi_linear.pc.in").read_text()
        text = re.sub(r"@(\w+)@", lambda m: str(values[m[1]]), text)
        (tools.lib / "kimi_linear.pc").write_text(text)


WHEEL = {"py_limited_api": "cp311"}
if sys.platform == "darwin":
    WHEEL["plat_name"] = f"macosx-{MACOS}-{platform.machine()}"  # Python's own may say universal2

setup(
    version=VERSION,
    ext_modules=[Extension("kimi_linear._core", sources=[], py_limited_api=True)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension, "lib": BuildLibrary},
    options={"bdist_wheel": WHEEL},
)
