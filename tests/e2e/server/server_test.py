#!/usr/bin/env python3
"""The HTTP server from outside: python3 tests/e2e/server/server_test.py build/jointkv [unittest's arguments]

Uses the `openai` client from a virtual environment in JOINTKV_CACHE, which it makes when it is missing. Exits with 77 when
there is no model file (JOINTKV_MODEL, or the one that `make setup` fetches) or the client cannot be installed.

JOINTKV_TEST_CANCELS: how many clients leave at random (300). JOINTKV_TEST_PATIENCE: factor on waiting times (1).
"""

import os
import pathlib
import subprocess
import sys
import unittest

OPENAI = "1.109.1"
SKIPPED = 77


def skip(reason):
    print(f"skipped: {reason}")
    sys.exit(SKIPPED)


def use_client():
    """Goes on in an interpreter that has the client."""
    cache = pathlib.Path(os.environ.get("JOINTKV_CACHE") or pathlib.Path.home() / ".cache" / "jointkv")
    python = cache / "openai-client" / "bin" / "python"
    if pathlib.Path(sys.prefix) == python.parent.parent:
        return
    test = [python, "-c", f"import openai; assert openai.__version__ == '{OPENAI}'"]
    if not python.exists() or subprocess.run(test, capture_output=True).returncode != 0:
        try:
            subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True, capture_output=True)
            subprocess.run([python, "-m", "pip", "install", "-q", f"openai=={OPENAI}"], check=True, capture_output=True,
                           timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            skip(f"the openai client cannot be installed: {error}")
    os.execv(python, [python, *sys.argv])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    use_client()
    os.environ["JOINTKV_PROGRAM"] = str(pathlib.Path(sys.argv.pop(1)).resolve())
    import support
    if not support.model_path().is_file():
        skip(f"there is no model file {support.model_path()}; `make setup` fetches it")
    from http_cases import Fields, Protocol, Streams  # noqa: F401
    from lifecycle_cases import Crowds, Ends, Leaving, SlowClients, Sockets, TenantsCase, TwoTenants  # noqa: F401
    from openai_cases import OpenAi  # noqa: F401
    from tool_cases import Tools, ToolsUnseen  # noqa: F401
    unittest.main(verbosity=2)
