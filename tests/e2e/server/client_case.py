"""Cases that ask a server of their own through the real `openai` client."""

import unittest

import openai

from support import Server


class ClientCase(unittest.TestCase):
    SERVER = ()  # arguments

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.SERVER)
        cls.client = openai.OpenAI(base_url=cls.server.address + "/v1", api_key="none", max_retries=0)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        assert cls.server.stop() == 0, "\n".join(cls.server.lines[-20:])
