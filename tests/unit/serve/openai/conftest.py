import pytest

from tests.support.openai_server import serving_engines


@pytest.fixture(scope="session")
def server(chat_engine, engine):
    """Two models: one with a chat template, and one of an exact cache."""
    with serving_engines({"example": chat_engine, "exact": engine("fp16")}) as (url, models):
        yield url, {model.name: model.llm for model in models}


@pytest.fixture
def url(server):
    return server[0]


@pytest.fixture
def llms(server):
    return server[1]
