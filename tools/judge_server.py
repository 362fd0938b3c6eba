"""A judge to start from: `python tools/judge_server.py 8077` scores images by their brightness. The protocol is in docs/judges.md."""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageStat

ABOUT = {"protocol": 1, "name": "brightness", "version": "1", "needs_prompt": False, "max_batch": 16, "seconds": 60}


def score(images, prompts):  # PIL images and their prompts -> a number for each, higher is better: your model goes here
    return [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]


class Judge(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, ABOUT)

    def do_POST(self):
        try:
            items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
            images = [Image.open(io.BytesIO(base64.b64decode(item["image"]))).convert("RGB") for item in items]
            found = score(images, [item["prompt"] for item in items])
            self.answer(200, {**ABOUT, "scores": [{"id": i["id"], "score": float(s)} for i, s in zip(items, found, strict=True)]})
        except Exception as error:
            self.answer(500, {"error": f"{type(error).__name__}: {error}"})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Judge).serve_forever()
