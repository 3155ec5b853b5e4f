// Names for the machine types, shared by device code and its host twins.
#pragma once

namespace cuattn {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

}  // namespace cuattn
