"""`moka push` and loading by name, against a stand-in of the Hub's HTTP interface on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

import moka
from moka.errors import MokaError
from moka.hub import card, names_repository, prepare

TOKEN = "hf_secret_of_this_test"
COMMIT = "0123456789012345678901234567890123456789"


class Hub(BaseHTTPRequestHandler):
    """What create_repo, create_commit and snapshot_download ask; everything but reading needs the token."""

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, headers=()):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, one in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, str(one))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Unauthorized"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.repos[f"{asked['organization']}/{asked['name']}"] = {}
            return self.answer({"url": f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"})
        repo = self.path.split("/api/models/")[1].rsplit("/", 2)[0]
        if "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitOid": COMMIT, "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"})

    def do_GET(self):
        for repo, files in self.server.repos.items():
            if self.path.startswith(f"/api/models/{repo}/tree/"):
                oids = {name: hashlib.sha1(file).hexdigest() for name, file in files.items()}
                return self.answer(
                    [{"type": "file", "path": n, "size": len(f), "oid": oids[n]} for n, f in files.items()]
                )
            if self.path.startswith(f"/api/models/{repo}"):
                siblings = [{"rfilename": name, "size": len(file)} for name, file in files.items()]
                return self.answer({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            if self.path.startswith(f"/{repo}/resolve/{COMMIT}/"):
                file = files[self.path.rpartition("/")[2].partition("?")[0]]
                return self.answer(file, headers={"ETag": f'"{hashlib.sha1(file).hexdigest()}"'})
        return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """The stand-in, and ``run(*words, token)``: a moka command that asks it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_HUB_DISABLE_XET": "1"}

    def run(*words, token=TOKEN):
        own = {**environment, "HF_TOKEN": token} if token else environment
        command = [sys.executable, "-m", "moka", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=False)
        assert TOKEN not in done.stdout + done.stderr
        return done

    yield server, run
    server.shutdown()
    server.server_close()


def test_a_pushed_run_answers_by_name(hub, trained_run):
    server, run = hub
    done = run("push", trained_run, "me/digits")
    assert done.returncode == 0, done.stderr
    assert f"commit/{COMMIT}" in done.stdout
    files = server.repos["me/digits"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "moka_model.json", "moka_processor.json"):
        assert files[name] == (trained_run / "adapter" / name).read_bytes()
    assert files["config.yaml"] == (trained_run / "config.yaml").read_bytes()
    answer = run("generate", "me/digits", "Which digit is written?", "--device", "cpu", token=None)
    assert answer.returncode == 0, answer.stderr
    expected = moka.load(trained_run, device="cpu").generate("Which digit is written?")
    assert answer.stdout.strip() == expected


def test_a_dry_run_sends_nothing(hub, trained_run):
    server, run = hub
    done = run("push", trained_run, "me/digits", "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert not server.repos
    assert "adapter_model.safetensors" in done.stdout
    assert 'moka.load("me/digits")' in done.stdout


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_who_may_not_write_is_told(hub, trained_run, token):
    done = hub[1]("push", trained_run, "me/digits", token=token)
    assert done.returncode == 2
    assert "refused me/digits (401)" in done.stderr
    assert "hf auth login" in done.stderr
    assert "hf_wrong" not in done.stdout + done.stderr


def test_a_name_that_the_hub_does_not_have(hub):
    done = hub[1]("generate", "me/nothing", "Which?", token=None)
    assert done.returncode == 2
    assert "me/nothing is neither a folder here nor a repository on the Hub" in done.stderr


def test_only_names_mean_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert names_repository("me/digits")
    for path in ("runs/typo", "digits", "a/b/c", "/abs/olute", "../up", "./here", "~/home", "me/di gits"):
        assert not names_repository(path), path


@pytest.mark.parametrize("name", ["digits", "a/b/c", "me/", "me/di gits", "me/..", "-me/x"])
def test_a_name_that_no_repository_can_have(trained_run, name):
    with pytest.raises(MokaError, match="no name of a repository"):
        prepare(trained_run, name)


def test_the_card_has_task_backbone_and_figures():
    scores = {"overall": {"right": 3, "n": 4, "accuracy": 0.75, "interval": [0.3, 0.95]}}
    text = '---\nlibrary_name: peft\nbase_model: /here/folder\n---\nmoka.load("runs/x"), "runs/x/adapter"\n'
    made = card(text, "me/x", "meta-llama/Llama-2-7b-chat-hf", {1, 2}, {"conditions": {"as given": scores}})
    _, head, body = made.split("---\n")
    head = yaml.safe_load(head)
    assert head["base_model"] == "meta-llama/Llama-2-7b-chat-hf"
    assert head["base_model_relation"] == "adapter"
    assert head["pipeline_tag"] == "image-text-to-text"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 75.0
    assert body == 'moka.load("me/x"), "me/x"\n'
    assert "/here/folder" not in made
    for kinds, task in (({1, 3}, "any-to-any"), ({3}, "audio-text-to-text")):
        assert yaml.safe_load(card(text, "me/x", None, kinds, None).split("---\n")[1])["pipeline_tag"] == task
