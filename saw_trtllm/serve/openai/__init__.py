"""A server in the words of OpenAI's API, over the runtime: FastAPI on uvicorn."""
