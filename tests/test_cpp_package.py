"""torchext in C++ projects of others, as examples/cpp/README.md has it.

From a wheel and from the source tree, with CMake and without, and beside a project's own Torch.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cpp_tools import PREFIXES, ROOT, need_tools, run

import torchext

README = ROOT / "examples" / "cpp" / "README.md"


def documented(language, holding=""):
    """A block of the examples' README."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if holding in block]
    return block


def app():
    """The documented program, and in it the call that is documented for itself."""
    program, call = documented("cpp", "int main"), documented("cpp", "LossExtras")
    inputs = (
        "const auto features = torch::rand({100, 64}), weight = torch::rand({32, 64}),\n"
        "  target = torch::randint(32, {100}, torch::kLong);\n"
    )
    checks = "if (!loss.defined() || !lse.defined() || argmax.defined()) return 1;\n"
    assert program.endswith("}\n")
    return f"{program[:-2]}{{{inputs}{call}{checks}}}}}\n"


def check_app(program):
    assert re.fullmatch(r"2\.\d+ .*torchext::.*CrossEntropyFunction.*\n", run(program))


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory):
    """A folder with this package from a wheel. The wheel has the library that is here already."""
    tree, site = tmp_path_factory.mktemp("tree") / "torchext", tmp_path_factory.mktemp("site")
    unwanted = ("[.]*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*unwanted))
    (tree / "setup.cfg").write_text("[build]\nbuild_lib = build/lib\n")
    (tree / "build" / "lib" / "torchext").mkdir(parents=True)
    for library in Path(torchext.__file__).parent.glob("*.so"):
        shutil.copy(library, tree / "build" / "lib" / "torchext")
    # Not `pip wheel`, which would compile for a minute: .ci/run does, and checks what it makes.
    run(sys.executable, "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build", cwd=tree)
    (wheel,) = (tree / "dist").glob("torchext-*.whl")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    return site


def test_cmake_project_with_the_wheel(wheel_site, tmp_path):
    """The documented project and command, where torchext is installed from a wheel."""
    need_tools()
    (tmp_path / "app.cpp").write_text(app())
    (tmp_path / "CMakeLists.txt").write_text(documented("cmake"))
    prefixes = re.search(
        r'-DCMAKE_PREFIX_PATH="\$\(.*?\)"', documented("sh", "cmake -B"), re.DOTALL
    )
    script = f"cmake -G Ninja -B build {prefixes.group()} && cmake --build build"
    run("sh", "-c", script, cwd=tmp_path, env={"PYTHONPATH": str(wheel_site)})
    check_app(tmp_path / "build" / "app")
    assert f"{wheel_site}/torchext/_C.abi3.so" in run("ldd", tmp_path / "build" / "app")
    assert f"{wheel_site}/torchext/include" in (tmp_path / "build" / "build.ninja").read_text()


def test_plain_compiler_line(tmp_path):
    need_tools()
    (tmp_path / "app.cpp").write_text(app())
    run("sh", "-e", "-c", documented("sh", "g++ "), cwd=tmp_path)
    check_app(tmp_path / "app")


@pytest.mark.skipif(torch.version.cuda is not None, reason="its TorchConfig.cmake wants nvcc")
def test_after_find_package_torch(tmp_path):
    """A project that has found Torch itself. No registration is dropped by the linker."""
    need_tools()
    (tmp_path / "app.cpp").write_text(
        "#include <ATen/core/dispatch/Dispatcher.h>\n"
        "int main() {\n"
        "  auto& dispatcher = c10::Dispatcher::singleton();\n"
        '  return dispatcher.findSchema({"torchext::linear_relu_forward", ""}).has_value() ? 0 : 1;'
        "\n}\n"
    )
    cmake = documented("cmake").replace(
        "find_package(TorchExt", "find_package(Torch REQUIRED)\nfind_package(TorchExt"
    )
    (tmp_path / "CMakeLists.txt").write_text(cmake)
    run("cmake", "-G", "Ninja", "-B", "build", f"-DCMAKE_PREFIX_PATH={PREFIXES}", cwd=tmp_path)
    run("cmake", "--build", "build", cwd=tmp_path)
    run(tmp_path / "build" / "app")
