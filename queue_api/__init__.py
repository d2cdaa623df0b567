"""What producers stand on: wire models, Redis, client, datasets. No torch.

Users import from `batchmill`. The wings, top to bottom: `datasets`, `client`, `store`,
`connection`, `wire`; each imports only from those below it, and nothing from `engine`, `workers`
or `batchmill`. Begin with `client/client.py`.
"""
