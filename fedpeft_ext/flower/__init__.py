"""The federation on machines of their own, with Flower (extra `flower`): the client and server code of
`fedpeft_ext.simulation` behind Flower's ServerApp and ClientApp.

    prepare(config, dataset, folder, num_nodes)   # files: one for the server, one for each node's users
    fedpeft_ext.flower.client.app                 # ClientApp: trains and ranks for the users of its node
    fedpeft_ext.flower.server.app                 # ServerApp: samples, averages, evaluates
    load_node(folder, data, state)                # a node's own users, to recommend to

A node holds one user (a phone) or several (a household, a shop). What a node's users have met and their own
state never leave it; per round it receives the averaged parameters and answers with each chosen user's update
of them. docs/flower.md tells how to start it.
"""

from fedpeft_ext.flower.files import prepare, read_node, read_server
from fedpeft_ext.flower.serving import load_node

__all__ = ["load_node", "prepare", "read_node", "read_server"]
