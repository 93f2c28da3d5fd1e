#pragma once
#include "codecs/trellis.h"
namespace kvpack {
constexpr TrellisLevels kTcq1Levels{200, {{1},{1}}};
constexpr TrellisLevels kTcq2Levels{200, {{1},{1}}};
constexpr TrellisLevels kTcq25Levels{200, {{1},{1}}};
constexpr TrellisLevels kTcq3Levels{200, {{1},{1}}};
constexpr TrellisLevels kTcq35Levels{200, {{1},{1}}};
constexpr TrellisLevels kTcq4Levels{200, {{1},{1}}};
}
