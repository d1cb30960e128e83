"""The HTTP front: OpenAI's speech API, a WebSocket for text that is still being written, and a web page to try it.

Start reading at app.py. Needs the extra `gateway` (Starlette, uvicorn, PyAV); nothing else of Barkstream imports it.
"""
