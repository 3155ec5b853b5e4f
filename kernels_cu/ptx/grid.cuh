// The order of launches on a stream, where a launch may start before those in front of it have ended ("programmatic dependent
// launch"). PTX ISA: "griddepcontrol", for sm_90 and newer.
#pragma once

namespace cuattn::ptx {

// Until all launches in front of this one have ended, and what they wrote can be read. No access to global memory before it.
__device__ __forceinline__ void wait_for_earlier_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Once every block has called it or returned, the launch behind this one may start.
__device__ __forceinline__ void let_later_launches_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace cuattn::ptx
