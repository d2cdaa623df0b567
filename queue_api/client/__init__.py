"""What an application uses: the asyncio and the synchronous client, runs, single calls.

It may import `store` and what is below it. Begin with client.py.
"""
