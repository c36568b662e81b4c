"""The server of live streams: websocket, batching, metrics and a page."""
