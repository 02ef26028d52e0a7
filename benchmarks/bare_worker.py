"""A decode worker whose step script keeps no promise: no epoch, no owner, no deadline, no log; it only joins and publishes the frame.

For `python -m benchmarks guarantees` alone: what a token costs without them.
"""

from __future__ import annotations

import pipeline.queue
from pipeline.connection import Script
from workers.__main__ import main

BARE_STEP = """
local root = KEYS[1]
local answers, items = {}, {}
for i = 3, #ARGV, 7 do
  answers[#answers + 1] = 0
  if ARGV[i + 5] ~= '' then redis.call('HSET', root .. 'req:' .. ARGV[i], 'fin:' .. ARGV[i + 2], ARGV[i + 5]) end
  items[#items + 1] = ARGV[i + 6]
end
redis.call('PUBLISH', root .. 'bus:' .. ARGV[1],
  string.char(0xdc, math.floor(#items / 256), #items % 256) .. table.concat(items))
return answers
"""


class _Script(Script):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        if name == "step":
            self.source = BARE_STEP


if __name__ == "__main__":
    pipeline.queue.Script = _Script  # type: ignore[misc]
    main()
