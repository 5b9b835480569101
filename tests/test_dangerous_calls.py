"""Calls that turn data into code are nowhere: SQL put together from strings, shells, pickles, loaders that unpickle.

Read from the source with `ast`; `ALLOWED` names what is what it seems and harmless all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_layers import modules

BANNED = {
    "eval": "evaluates a string",
    "exec": "runs a string",
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "pickle.load": "unpickles",
    "pickle.loads": "unpickles",
    "cloudpickle.loads": "unpickles",
    "marshal.loads": "loads code",
    "yaml.load": "makes objects: use yaml.safe_load",
    "yaml.unsafe_load": "makes objects",
    "mlflow.pyfunc.load_model": "unpickles",
    "joblib.load": "unpickles",
    "jinja2.Template": "renders outside the sandbox",
}
SQL = ("execute", "exec_driver_sql", "text", "scalar", "scalars")
ALLOWED = {
    ("cluster.store", "connection.execute takes SQL that is put together"),  # a PRAGMA out of four constants
    ("cluster.migrations.versions.0006_ledger", "op.execute takes SQL that is put together"),  # triggers of tables by name
    ("cluster.migrations.versions.0008_audit", "op.execute takes SQL that is put together"),  # likewise
}


def dangers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in BANNED:
            yield f"{name} {BANNED[name]}"
        if keywords.get("shell") == "True":
            yield f"{name} starts a shell"
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load unpickles without weights_only=True"
        if keywords.get("trust_remote_code") == "True":
            yield f"{name} runs code that comes with a model"
        if name.rpartition(".")[2] in SQL and node.args and is_made_up(node.args[0]):
            yield f"{name} takes SQL that is put together"


def is_made_up(query: ast.expr) -> bool:
    """An f-string with something in it, a sum or a `%` with a string, or `.format`."""
    if isinstance(query, ast.JoinedStr):
        return any(isinstance(part, ast.FormattedValue) for part in query.values)
    if isinstance(query, ast.BinOp):
        return any(isinstance(part, ast.JoinedStr | ast.Constant) for part in ast.walk(query)) and isinstance(
            query.op, ast.Add | ast.Mod
        )
    return isinstance(query, ast.Call) and ast.unparse(query.func).endswith(".format")


def test_no_module_turns_data_into_code() -> None:
    found = {(name, danger) for name, path in modules().items() for danger in dangers(ast.parse(path.read_text()))}
    assert sorted(found - ALLOWED) == []


@pytest.mark.parametrize(
    "planted",
    [
        'connection.execute(f"SELECT {name}")',
        'connection.execute(sa.text("SELECT " + name))',
        'sa.text("SELECT %s" % name)',
        'sa.text("SELECT {}".format(name))',
        "subprocess.run(command, shell=True)",
        "pickle.loads(data)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_a_planted_call_is_found(planted: str) -> None:
    assert list(dangers(ast.parse(planted)))
    assert not list(dangers(ast.parse('sa.text("SELECT 1"); torch.load(path, weights_only=True); yaml.safe_load(text)')))
