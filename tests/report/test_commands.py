"""`rollway report` and `rollway serve` as typed."""

import signal
import subprocess
import sys
import urllib.request

from report.page import Page
from rollway.cli import main
from store.synthetic import make_results


def test_report_writes_the_page_again_and_keeps_its_title(tmp_path, capsys):
    make_results(tmp_path, {"grpo-s0": 1})
    assert main(["report", "--results", str(tmp_path), "--title", "first"]) == 0
    assert main(["report", "--results", str(tmp_path)]) == 0
    assert Page(tmp_path / "report.html").summary["title"] == "first"
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "sub/other.html")]) == 0
    assert (tmp_path / "sub/other.html").is_file()
    assert "report.html: 0." in capsys.readouterr().out


def test_report_of_no_folder_is_one_sentence(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path / "none")]) == 1
    assert "no such results folder" in capsys.readouterr().err


def test_serve_says_where_and_ends_on_ctrl_c(tmp_path):
    make_results(tmp_path, {"grpo-s0": 1})
    command = [sys.executable, "-c", "from rollway.cli import entry; entry()", "serve", "--port", "0"]
    server = subprocess.Popen([*command, "--results", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    try:
        address = server.stderr.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert b"data-summary" in answer.read()
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.stderr.close()
