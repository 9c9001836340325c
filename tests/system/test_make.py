"""`make run` without a terminal: what it prints, the line of curl that works, streams, errors, and how it ends."""

import json
import subprocess
import time

import pytest
from tests.system.shell import ROOT, Shell, free_port, tool

pytestmark = pytest.mark.system


def test_make_run_serves_curl_and_ends_when_told(shell: Shell) -> None:
    curl = tool("curl")
    port = free_port()
    with shell.background(f"make run PORT={port}", cwd=ROOT, patience=120) as lines:
        assert lines[-1] == f"ready http://127.0.0.1:{port}/v1"
        assert any(line.startswith("SIMULATED") for line in lines)
        shown = next(line for line in lines if line.startswith("curl "))
        answer = json.loads(shell.run(f"{shown} -s").stdout)
        assert answer["choices"][0]["message"]["content"]

        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        ask = f"{curl} -sN {url} -H 'content-type: application/json' -d"
        body = '"model": "default", "messages": [{"role": "user", "content": "Hello"}]'
        _streams_with_usage(
            shell.run(f'{ask} \'{{{body}, "stream": true, "stream_options": {{"include_usage": true}}}}\'').stdout
        )
        error = json.loads(shell.run(f"{ask} '{{{body}, \"temperature\": 9}}'").stdout)["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == "temperature"
        _cancels(f'{ask} \'{{{body}, "stream": true, "max_tokens": 3000}}\'', shell)
        assert shell.run(f"{ask} '{{{body}}}'").returncode == 0


def _streams_with_usage(text: str) -> None:
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0


def _cancels(command: str, shell: Shell) -> None:
    streaming = subprocess.Popen(f"exec {command}", shell=True, env=shell.environment, stdout=subprocess.PIPE)
    assert streaming.stdout is not None
    assert streaming.stdout.read(64)
    streaming.terminate()
    assert streaming.wait(10) != 0
    streaming.stdout.close()
    time.sleep(0.2)
