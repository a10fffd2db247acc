"""The batch side of serving: releases, online features, the bento, the log of answers. No worker imports it."""
