import ast
import sys
from pathlib import Path

import cloister.enclave.pyapp as room

BESIDE = ("wire", "child", "confinement", "filter", "unpacking", "asgi", "wsgi")


def test_what_runs_beside_an_app_imports_the_standard_library_and_each_other() -> None:
    """Anything else would have to be on the app's search path, and could be another version than the app's."""
    folder = Path(room.__file__).parent
    allowed = sys.stdlib_module_names | {f"{room.__name__}.{name}" for name in BESIDE} | {room.__name__}
    for name in BESIDE:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            assert [
                one for one in names if one not in allowed and one.split(".")[0] not in sys.stdlib_module_names
            ] == []
