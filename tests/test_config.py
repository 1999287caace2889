"""Settings of an environment: what wins, what is refused, what is said about it, and what never is."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from deployments.cli import PANELS
from deployments.running import RESOLVED
from shared import environment
from shared.environment import BadSettings
from shared.errors import Refused
from shared.safety import refuse_unsafe, shown, unsafe
from shared.settings import Settings, variable
from tests.core_fixtures import ROOT
from tests.environment_fixtures import KEY_IDS, SAFE, SECRET, Done, bare, engram, nothing_set, settings  # noqa: F401

CANARY = "hunter2-never-print-me"
KNOWN = frozenset(Settings.model_fields)


MODULES = ("gateway.serve", "deployments.worker")
WATCHERS = [("bridge",), ("monitor",)]
PROCESSES = [("up",), ("up", "--detach"), *((name,) for name in PANELS["Single processes, as production runs them"])]


def test_no_process_starts_unsafe_and_config_check_says_the_same() -> None:
    """Exit 3, one line, nothing written; the list of `config check` is the list of the process. The machine that only
    watches is given no more than it uses, and is judged by that."""
    data_dir = Path("/var/tmp") / f"engram-{secrets.token_hex(8)}"
    variables = SAFE | {"ENGRAM_ENV": "prod", "ENGRAM_DATA_DIR": str(data_dir)}
    variables |= {"ENGRAM_RATE_LIMIT_MODE": "shadow", "ENGRAM_JWKS_URL": "http://issuer.test"}
    variables |= {"ENGRAM_MONITORING_MINUTE_SECONDS": "30"}
    check = engram("config", "check", "--json", **variables)
    checked = json.loads(check.stdout)
    assert (checked["environment"], checked["safe"], check.returncode) == ("prod", False, 3)
    names = [found["name"] for found in checked["unsafe"]]
    assert names == ["ENGRAM_JWKS_URL", "ENGRAM_RATE_LIMIT_MODE", "ENGRAM_MONITORING_MINUTE_SECONDS"]
    assert check.stderr == f"engram: prod is not safe to start, 3 to mend: {', '.join(names)}\n"
    alone = [
        subprocess.Popen(
            [sys.executable, "-m", module],
            env=bare() | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for module in MODULES
    ]
    done: dict[object, Done] = {arguments: engram(*arguments, **variables) for arguments in PROCESSES}
    for module, process in zip(MODULES, alone, strict=True):
        done[module] = Done(process.wait(60), *process.communicate())
    assert len(done) == 11
    for what, answer in done.items():
        assert (answer.returncode, answer.stdout) == (3, ""), (what, answer.stderr)
        [line] = answer.stderr.splitlines()
        for found in checked["unsafe"]:
            if what in WATCHERS and found["name"] != "ENGRAM_MONITORING_MINUTE_SECONDS":
                assert found["name"] not in line, what
                continue
            assert f"{found['name']} is {found['value']} ({found['why']}), want {found['want']}" in line, what
    assert not data_dir.exists()


def test_check_names_what_no_process_could_read_beside_what_is_unsafe() -> None:
    """One list, one edit: names that are none, values that are none, a certificate without its key, unsafe values."""
    wrong = {"ENGRAM_QQQ": CANARY, "ENGRAM_GATEWAY_PORT": CANARY, "ENGRAM_TLS_CERTIFICATE": "c.pem"}
    wrong |= {"ENGRAM_ROUTING": "forward", "ENGRAM_S3_READ_ACCESS_KEY_ID": CANARY}
    wrong |= {"ENGRAM_MACHINE_ID": "local", "ENGRAM_DOCS_PAGES": "true", "ENGRAM_RATE_LIMIT_MODE": "shadow"}
    check = engram("config", "check", "--json", ENGRAM_ENV="prod", **SAFE | wrong)
    assert check.returncode == 3 and CANARY not in check.stdout + check.stderr
    found = [name for f in json.loads(check.stdout)["unsafe"] for name in f["name"].split()]
    assert found == [
        *("ENGRAM_QQQ", "ENGRAM_GATEWAY_PORT", "ENGRAM_ROUTING", "ENGRAM_TLS_CERTIFICATE", "ENGRAM_TLS_KEY"),
        *("ENGRAM_S3_READ_ACCESS_KEY_ID", "ENGRAM_S3_READ_SECRET_ACCESS_KEY"),
        *("ENGRAM_DOCS_PAGES", "ENGRAM_RATE_LIMIT_MODE", "ENGRAM_MACHINE_ID"),
    ]
    process = engram("serve", ENGRAM_ENV="prod", ENGRAM_TLS_KEY="k.pem", ENGRAM_ROUTING="forward", **SAFE)
    assert process.returncode == 2 and "needs routing_urls; tls_certificate and tls_key" in process.stderr
    dev = engram("config", "check", ENGRAM_TLS_KEY="k.pem")
    assert dev.returncode == 3 and dev.stderr.startswith(
        "engram: dev would not start, 1 to mend: ENGRAM_TLS_CERTIFICATE"
    )


def test_check_looks_at_the_certificate_too(tmp_path: Path) -> None:
    """The one thing settings alone cannot tell; exit 0 when there is nothing to say."""
    missing = {"ENGRAM_TLS_CERTIFICATE": str(tmp_path / "c.pem"), "ENGRAM_TLS_KEY": str(tmp_path / "k.pem")}
    refused = engram("config", "check", ENGRAM_ENV="staging", **SAFE, **missing)
    assert refused.returncode == 3 and "No such file" in refused.stdout
    fine = engram("config", "check", ENGRAM_ENV="staging", **SAFE)
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "staging: nothing to object to\n", "")


def test_the_environment_wins_over_the_value_file_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an empty variable is not set: the file's value stands."""
    monkeypatch.setenv("ENGRAM_ENV", "staging")
    assert (Settings().rate_limit_mode, Settings().hsts_seconds) == ("shadow", 86_400)
    monkeypatch.setenv("ENGRAM_RATE_LIMIT_MODE", "enforce")
    monkeypatch.setenv("ENGRAM_HSTS_SECONDS", "")
    assert (Settings().rate_limit_mode, Settings().hsts_seconds) == ("enforce", 86_400)
    assert Settings(env="dev").hsts_seconds == 0
    assert Settings(hsts_seconds=5).hsts_seconds == 5
    assert Settings().lease_seconds == Settings.model_fields["lease_seconds"].default


def test_unknown_names_in_the_environment_are_errors_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ENGRAM_RATE_LIMIT_RSP=10` limits nobody; all of them are named, whatever their case."""
    monkeypatch.setenv("ENGRAM_RATE_LIMIT_RSP", "10")
    monkeypatch.setenv("engram_jwks_uri", "x")
    monkeypatch.setenv("ENGRAM_QQQ", CANARY)
    with pytest.raises(BadSettings) as refused:
        Settings()
    assert str(refused.value).split("; ") == [
        "ENGRAM_QQQ is no setting",
        "ENGRAM_RATE_LIMIT_RSP is no setting: did you mean ENGRAM_RATE_LIMIT_RPS?",
        "engram_jwks_uri is no setting: did you mean ENGRAM_JWKS_URL?",
    ]
    done = engram("status", ENGRAM_DATA_DIRECTORY="x")
    assert done.returncode == 2
    assert done.stderr == "engram: ENGRAM_DATA_DIRECTORY is no setting: did you mean ENGRAM_DATA_DIR?\n"


def test_a_value_file_is_read_strictly(tmp_path: Path) -> None:
    """A line that is none, a name twice, a name that is no setting: all at once, and never the line's text."""
    file = tmp_path / "prod.env"
    file.write_text(
        f"# comment\n\nENGRAM_HSTS_SECONDS=5\nexport X={CANARY}\nENGRAM_HSTS_SECONDS=6\nENGRAM_HSTS_SECOND=7\n"
        f"X_Q={CANARY}\nENGRAM_ENV=dev\n"
    )
    with pytest.raises(BadSettings) as refused:
        environment.read(file, KNOWN)
    assert str(refused.value) == (
        f"{file}: line 4 is not ENGRAM_NAME=value; ENGRAM_HSTS_SECONDS is there twice; "
        "ENGRAM_HSTS_SECOND is no setting: did you mean ENGRAM_HSTS_SECONDS?; "
        "X_Q is no setting; ENGRAM_ENV chooses the file and cannot be in it"
    )
    for wrong in (tmp_path / "missing.env", tmp_path):
        with pytest.raises(BadSettings, match=str(wrong)):
            environment.read(wrong, KNOWN)
    good = tmp_path / "good.env"
    good.write_text("  ENGRAM_JWT_AUDIENCE=no \nENGRAM_JWT_ISSUER=a=b # c\nENGRAM_JWKS_URL=\n")
    assert dict(environment.read(good, KNOWN)) == {"jwt_audience": "no", "jwt_issuer": "a=b # c"}


def test_a_missing_value_file_is_no_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A prod that was packaged wrongly must not run as dev."""
    monkeypatch.setattr(environment, "DIRECTORY", tmp_path)
    with pytest.raises(BadSettings, match=r"prod\.env: No such file"):
        Settings(env="prod")


def test_the_value_files_hold_no_secret_and_nothing_that_up_resolves() -> None:
    """Secrets come from the environment alone; in dev a port in the file would look as if a person had set it."""
    held = {env: set(environment.read(environment.value_file(env), KNOWN)) for env in environment.ENVIRONMENTS}
    for env in environment.ENVIRONMENTS:
        assert not held[env] & (SECRET | KEY_IDS)
    assert not held["dev"] & set(RESOLVED)
    assert {f.stem for f in environment.DIRECTORY.iterdir()} == set(environment.ENVIRONMENTS)


def test_an_installed_project_finds_the_files_wherever_it_is_started(tmp_path: Path) -> None:
    """They lie beside the packages, not in the current directory."""
    site = tmp_path / "site-packages"
    for package in ("shared", "deployments"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import shared.settings as s; print(s.__file__); print(s.Settings(env='prod').hsts_seconds);"
        "print(s.Settings(env='staging').hsts_seconds)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=bare() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(site / "shared" / "settings" / "__init__.py"), "31536000", "86400"]


SECRET_VARIABLES = {
    **{variable(name): CANARY for name in SECRET},
    **{variable(name): f"AKID{CANARY}" for name in KEY_IDS},
    "ENGRAM_CONTROL_PLANE_URL": f"postgresql://u:{CANARY}@h.test/d?sslmode=verify-full&sslpassword={CANARY}",
    "ENGRAM_OBJECT_STORE_URL": f"http://u:{CANARY}@store.test/x?key={CANARY}",
    "ENGRAM_JWKS_URL": f"http://u:{CANARY}@issuer.test/jwks?token={CANARY}",
    "PREFECT_API_URL": f"http://u:{CANARY}@prefect.test/api?token={CANARY}",
}


def test_no_secret_is_ever_printed() -> None:
    """Not by check, diff, show or a refused start, as a table or as JSON; not when a setting beside it is wrong."""
    made = settings("prod", **{_field(name): value for name, value in SECRET_VARIABLES.items()})
    printed = [shown(made, name) for name in Settings.model_fields] + [str(unsafe(made))]
    with pytest.raises(Refused) as refused:
        refuse_unsafe(made)
    printed.append(str(refused.value))
    with pytest.raises(ValidationError) as wrong:
        settings("prod", tls_key="only", **{_field(n): v for n, v in SECRET_VARIABLES.items()})
    printed.append(str(wrong.value))
    with pytest.raises(ValidationError) as wrong:
        settings("prod", gateway_port=CANARY, lease_seconds=-1)
    printed.append(str(wrong.value))
    for arguments in (("check",), ("check", "--json"), ("diff",), ("show", "--json")):
        done = engram("config", *arguments, ENGRAM_ENV="prod", **(SAFE | SECRET_VARIABLES))
        printed.append(done.stdout + done.stderr)
        assert done.stdout
    done = engram("config", "show", ENGRAM_GATEWAY_PORT=CANARY, ENGRAM_LEASE_SECONDS="0", ENGRAM_TLS_KEY="x")
    assert done.returncode == 2
    assert "ENGRAM_GATEWAY_PORT" in done.stderr and "ENGRAM_LEASE_SECONDS" in done.stderr
    assert CANARY not in "\n".join([*printed, done.stdout, done.stderr])


@pytest.mark.parametrize("url", [CANARY, f"postgresql://{CANARY}", f"host=h password={CANARY}", f"service={CANARY}"])
def test_a_database_address_that_is_none_is_not_shown(url: str) -> None:
    """A password pasted where the URL belongs."""
    printed = shown(Settings(control_plane_url=SecretStr(url)), "control_plane_url")
    assert CANARY not in printed.replace(f"host={CANARY}", "")
    assert printed


def test_diff_shows_what_differs_and_show_where_it_comes_from() -> None:
    """Between two files, a file and the defaults, and here and the defaults."""
    two = json.loads(engram("config", "diff", "staging", "prod", "--json", **SAFE).stdout)
    differing = {row["name"]: (row["staging"], row["prod"]) for row in two}
    assert differing["ENGRAM_RATE_LIMIT_MODE"] == ("shadow", "enforce")
    assert differing["ENGRAM_ENV"] == ("staging", "prod")
    assert all(left != right for left, right in differing.values())
    assert not differing.keys() & (SAFE.keys() - {"ENGRAM_ENV"}), "this process's own values belong to neither"
    one = {row["name"]: row for row in json.loads(engram("config", "diff", "dev", "--json").stdout)}
    assert (one["ENGRAM_HSTS_SECONDS"]["dev"], one["ENGRAM_HSTS_SECONDS"]["default"]) == ("0", "31536000")
    here = json.loads(engram("config", "diff", "--json", ENGRAM_ENV="prod", ENGRAM_LEASE_SECONDS="20").stdout)
    origins = {row["name"]: row["from"] for row in here}
    assert origins["ENGRAM_LEASE_SECONDS"] == origins["ENGRAM_ENV"] == "environment"
    assert origins["ENGRAM_GATEWAY_HOST"] == "prod.env"
    assert engram("config", "diff", "production").returncode == 2
    shown_here = json.loads(engram("config", "show", "--json", ENGRAM_ENV="prod").stdout)
    assert [row["name"] for row in shown_here] == [variable(name) for name in Settings.model_fields]
    assert {row["from"] for row in shown_here} == {"environment", "prod.env", "default"}


def _field(variable: str) -> str:
    return variable.removeprefix("ENGRAM_").lower()
