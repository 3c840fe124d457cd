from llmcompress.grids import legacy, kquants
GRIDS = {g.name: g for m in (legacy, kquants) for g in vars(m).values() if isinstance(g, legacy.Grid)}
